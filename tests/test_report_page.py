"""The report in a browser: headless Chromium, driven by selenium."""

from __future__ import annotations

import json
import operator
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from atp_fast import Node
from atp_fast.results import save_figure
from atp_fast.results.prompts import Prompt
from atp_fast.study import run_study, write_study
from test_evaluation import PLAN, FakeCase
from test_results import HOSTILE, attribution, patch_effects

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium here: apt-get install chromium chromium-driver"
)
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

TOKENS = ["<b>bold</b>", ' "quoted"', " שלום", HOSTILE]
OTHER = ["<b>bold</b>", " 'quoted'", " עולם", HOSTILE]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "window-size=1200,1000",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.binary_location = CHROMIUM
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def run() -> Any:
    """Scores of q, neuron and mlp_out nodes on texts that look like markup."""
    places = list(range(4))
    return attribution(tokens=TOKENS, prompts=[Prompt(TOKENS, places, OTHER, places)])


@pytest.fixture(scope="module")
def page(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    nodes = list(map(Node, *zip(*run.top(5), strict=True)))
    generator = torch.Generator().manual_seed(1)
    exact = patch_effects(
        nodes=nodes, effect=torch.randn(2, 5, generator=generator), metric=run.metric,
        direction=run.direction, tokens=TOKENS,
    )  # fmt: skip
    run.report(path, exact=exact)
    return path


@pytest.fixture
def opened(browser: Any, page: Path) -> Iterator[Any]:
    """The page, loaded anew in the light scheme; nothing may be fetched and no error reported until the test ends."""
    scheme(browser, "light")
    for log in ("browser", "performance"):
        browser.get_log(log)
    load(browser, page)
    yield browser
    assert browser.get_log("browser") == []
    assert requests(browser) <= {page.as_uri()}


def load(browser: Any, page: Path) -> None:
    """Open a page, and wait until its script has run to its end, where figures are drawn."""
    browser.get(page.as_uri())
    drawn = """return [...document.querySelectorAll(".figure")].every(
        figure => figure.hidden || figure.querySelector(".main-svg"))"""
    until(browser, lambda: browser.execute_script(drawn))


def until(browser: Any, check: Callable[[], Any]) -> Any:
    """What check gives once it is true."""
    return WebDriverWait(browser, 20, 0.05).until(lambda _: check())


def requests(browser: Any) -> set[str]:
    """Everything the browser asked for since the log was read, but what the page itself holds."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    }
    assert messages
    return {url for url in asked if not url.startswith(("data:", "blob:"))}


def scheme(browser: Any, name: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": name}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def find(browser: Any, selector: str) -> list[Any]:
    return list(browser.find_elements(By.CSS_SELECTOR, selector))


def rows(browser: Any) -> list[list[str]]:
    """The cells of the rows that are shown, top to bottom."""
    script = """return [...document.querySelectorAll("#nodes tbody tr")].filter(row => row.checkVisibility())
        .map(row => [...row.cells].map(cell => cell.textContent))"""
    return list(browser.execute_script(script))


def column(browser: Any, name: str) -> list[str]:
    names = [header.text.rstrip(" ▲▼") for header in find(browser, "#nodes th")]
    return [row[names.index(name)] for row in rows(browser)]


def header(browser: Any, name: str) -> Any:
    (found,) = [h for h in find(browser, "#nodes th") if h.text.rstrip(" ▲▼") == name]
    return found


def focused(browser: Any) -> Any:
    return browser.switch_to.active_element


def test_texts_are_texts(opened: Any, run: Any) -> None:
    prompt = find(opened, ".prompt .token")
    assert [token.get_property("textContent") for token in prompt] == TOKENS
    assert find(opened, ".other")[0].get_property("textContent") == "".join(OTHER)
    assert [m.get_property("textContent") for m in find(opened, "mark")] == OTHER[1:3]
    assert set(column(opened, "token")) == set(TOKENS)
    assert not find(opened, "body img, body b, .prompt style")
    assert find(opened, ".prompt")[0].get_property("dir") == "auto"
    labels = [text.text for text in find(opened, "#by-position .xaxislayer-above text")]
    assert labels[0] == "0 <b>bold</b>" and labels[2] == "2  שלום"


def test_every_node_is_in_the_table(opened: Any, run: Any) -> None:
    assert [row[:8] for row in rows(opened)] == [
        [str(rank), n.kind, str(n.layer), str(n.index), str(n.position), n.token,
         f"{n.contribution:.5g}", f"{n.effect:+.5g}"]
        for rank, n in enumerate(run.top(72), 1)
    ]  # fmt: skip
    exact = column(opened, "exact effect")
    assert all(exact[:5]) and not any(exact[5:])
    assert find(opened, "#count")[0].text == "72 of 72 nodes"


@pytest.mark.parametrize("by", ["click", "keyboard"])
def test_a_header_sorts(opened: Any, run: Any, by: str) -> None:
    def press(name: str) -> Any:
        button = header(opened, name).find_element(By.TAG_NAME, "button")
        button.click() if by == "click" else button.send_keys(Keys.ENTER)
        (state,) = {h.get_attribute("aria-sort") for h in find(opened, "#nodes th")} - {"none"}
        assert header(opened, name).get_attribute("aria-sort") == state
        return state

    assert header(opened, "contribution").get_attribute("aria-sort") == "descending"
    effects = sorted(float(f"{n.effect:.5g}") for n in run.top(72))
    assert press("effect") == "descending"
    assert [float(x) for x in column(opened, "effect")] == effects[::-1]
    assert press("effect") == "ascending"
    assert [float(x) for x in column(opened, "effect")] == effects
    assert press("kind") == "ascending"
    assert column(opened, "kind") == sorted(n.kind for n in run.top(72))
    ranks = [int(x) for x in column(opened, "rank")]
    assert ranks[:8] == sorted(ranks[:8])  # equal ones stay in order
    assert press("exact contribution") == "descending"
    values = column(opened, "exact contribution")
    assert [float(x) for x in values[:5]] == sorted(map(float, values[:5]), reverse=True)
    assert press("exact contribution") == "ascending"
    assert [bool(x) for x in column(opened, "exact contribution")] == [True] * 5 + [False] * 67


def test_kinds_and_words_filter(opened: Any, run: Any) -> None:
    nodes = run.top(72)

    def count() -> int:
        shown = len(rows(opened))
        assert find(opened, "#count")[0].text == f"{shown} of 72 nodes"
        return shown

    box = find(opened, "#filters [value=neuron]")[0]
    box.send_keys(Keys.SPACE)
    assert set(column(opened, "kind")) == {"q", "mlp_out"} and count() == 2 * 4 * 4
    search = find(opened, "#search")[0]
    for words, wanted in (
        ("L1 h2", [n for n in nodes if (n.kind, n.layer, n.index) == ("q", 1, 2)]),
        ("@3 q", [n for n in nodes if (n.kind, n.position) == ("q", 3)]),
        ("QUOTED", [n for n in nodes if n.kind != "neuron" and "quoted" in n.token]),
        ("</script>", [n for n in nodes if n.kind != "neuron" and n.token == HOSTILE]),
        ("l9", []),
    ):
        search.clear()
        search.send_keys(words)
        places = [tuple(row[1:5]) for row in rows(opened)]
        assert places == [(n.kind, str(n.layer), str(n.index), str(n.position)) for n in wanted]
        assert count() == len(wanted)
    search.send_keys(Keys.ENTER)  # sends no form
    assert opened.current_url.endswith("report.html")
    search.clear()
    search.send_keys("q", Keys.BACK_SPACE)
    box.click()
    assert count() == 72


def tip_of(run: Any, position: int) -> list[str]:
    nodes = [n for n in run.top(72) if n.position == position]
    total = sum(n.contribution for n in nodes)
    names = {
        "q": "L{0.layer} H{0.index} q",
        "neuron": "L{0.layer} N{0.index}",
        "mlp_out": "L{0.layer} mlp_out",
    }
    best = [f"{names[n.kind].format(n)}: {n.contribution:.4g}" for n in nodes[:5]]
    return [f"position {position}: {total:.4g} in all", *best]


def test_a_token_names_its_best_nodes_under_the_pointer(opened: Any, run: Any) -> None:
    (tip,) = find(opened, "#tip")
    assert not tip.is_displayed()
    for position, token in enumerate(find(opened, ".prompt .token")):
        ActionChains(opened).move_to_element(token).perform()
        assert tip.text.split("\n") == tip_of(run, position)
    box, at = tip.rect, token.rect
    assert box["y"] >= at["y"] + at["height"] and box["x"] >= 0
    ActionChains(opened).move_to_element(find(opened, "h1")[0]).perform()
    assert not tip.is_displayed()


def test_the_keyboard_walks_along_a_prompt(opened: Any, run: Any) -> None:
    (tip,) = find(opened, "#tip")
    tokens = find(opened, ".prompt .token")
    focused(opened).send_keys(Keys.TAB)
    for key, here in (
        (None, 0), (Keys.ARROW_RIGHT, 1), (Keys.ARROW_RIGHT, 2), (Keys.ARROW_LEFT, 1), (Keys.END, 3),
        (Keys.ARROW_RIGHT, 3), (Keys.HOME, 0), (Keys.ARROW_LEFT, 0), (Keys.ARROW_RIGHT, 1),
    ):  # fmt: skip
        if key:
            focused(opened).send_keys(key)
        assert focused(opened) == tokens[here]
        assert tip.is_displayed() and tip.text.split("\n") == tip_of(run, here)
        assert tokens[here].get_attribute("aria-describedby") == "tip"
    at = tip.rect["y"]
    opened.execute_script("scrollBy(0, 40)")
    until(opened, lambda: tip.rect["y"] == at)  # in the page: it follows its token
    assert opened.execute_script("return scrollY") == 40 and tip.is_displayed()
    focused(opened).send_keys(Keys.ESCAPE)
    assert not tip.is_displayed() and not find(opened, "[aria-describedby=tip]")
    focused(opened).send_keys(Keys.ENTER)
    assert tip.text.split("\n") == tip_of(run, 1)
    focused(opened).send_keys(Keys.TAB)  # one stop a prompt, then the search
    assert focused(opened).get_attribute("id") == "search" and not tip.is_displayed()
    focused(opened).send_keys(Keys.SHIFT, Keys.TAB)
    assert focused(opened) == tokens[1]


def test_arrows_follow_the_direction_of_the_text(browser: Any, tmp_path: Path) -> None:
    words, places = ["שלום", " עולם", " טוב", "!"], list(range(4))
    attribution(tokens=words, prompts=[Prompt(words, places, [], [])]).report(
        tmp_path / "page.html"
    )
    load(browser, tmp_path / "page.html")
    tokens = find(browser, ".prompt .token")
    assert tokens[0].rect["x"] > tokens[1].rect["x"]
    focused(browser).send_keys(Keys.TAB)
    focused(browser).send_keys(Keys.ARROW_LEFT)
    assert focused(browser) == tokens[1]
    assert tokens[1].rect["x"] < tokens[0].rect["x"]


def z(browser: Any, figure: str) -> Any:
    script = f'return document.getElementById("{figure}").calcdata[0][0].z.map(row => [...row])'
    return torch.tensor(browser.execute_script(script))


def test_maps_show_what_is_chosen(opened: Any, run: Any) -> None:
    """Chosen with the keyboard; what one of a layer has, and neurons, have no map by head."""
    for kind in ("q", "neuron", "mlp_out"):
        for score in ("effect", "contribution"):
            find(opened, f"#choices [value={kind}]")[0].send_keys(Keys.SPACE)
            find(opened, f"#choices [value={score}]")[0].send_keys(Keys.SPACE)
            by_position, by_head = (find(opened, f"#by-{x}")[0] for x in ("position", "head"))
            assert (
                by_position.get_attribute("aria-label")
                == f"Map of {kind} {score}, layer by position"
            )
            wanted = run.totals(kind, by=score, over="position")
            torch.testing.assert_close(z(opened, "by-position"), wanted, rtol=5e-3, atol=1e-3)
            assert by_head.is_displayed() == (kind == "q")
            if kind == "q":
                wanted = run.totals(kind, by=score, over="head")
                torch.testing.assert_close(z(opened, "by-head"), wanted, rtol=5e-3, atol=1e-3)


def test_a_cell_of_a_map_says_its_token(opened: Any, run: Any) -> None:
    box = find(opened, "#by-position .nsewdrag")[0]
    opened.execute_script("arguments[0].scrollIntoView()", box)
    shift = box.size["width"] / 8  # from the middle into the third of four columns
    ActionChains(opened).move_to_element_with_offset(box, int(shift), 5).perform()
    (hover,) = until(opened, lambda: find(opened, "#by-position .hovertext"))
    text = hover.text
    said = re.fullmatch(r"layer ([01]), position 2  שלום: (.*)", text)
    effect = float(run.totals("q", by="effect", over="position")[int(said[1]), 2])
    assert float(said[2].replace("−", "-")) == pytest.approx(effect, rel=1e-3)


def test_dark_and_light(opened: Any) -> None:
    """The page and its figures follow the system's scheme, also when it changes while the page is open."""

    def look() -> list[str]:
        script = """const style = (x, name) => getComputedStyle(document.querySelector(x))[name];
            return [style("body", "backgroundColor"), style("body", "color"), style(".token", "backgroundColor"),
                style("#by-position .ytick text", "fill"), style("#scatter .xtick text", "fill"),
                document.querySelector("#by-position .hm image").href.baseVal]"""
        return list(opened.execute_script(script))

    light = look()
    scheme(opened, "dark")
    until(opened, lambda: all(map(operator.ne, light, look())))
    dark = look()
    scheme(opened, "light")
    until(opened, lambda: look() == light)
    for back, text, axis in ((*light[:2], light[3]), (*dark[:2], dark[3])):
        assert contrast(back, text) > 7 and contrast(back, axis) > 7


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours rgb(r, g, b)."""

    def luminance(colour: str) -> float:
        parts = [float(x) / 255 for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_what_can_be_used_has_a_name(opened: Any) -> None:
    """Inputs have labels, headers buttons, and everything is reached with the tab key."""
    assert not [b for b in find(opened, ".modebar-btn") if "Share" in b.accessible_name]
    for control in find(opened, "input, button, [role=region], [role=figure]"):
        if control.is_displayed():
            assert control.accessible_name, control.get_attribute("outerHTML")
    assert len(find(opened, "#nodes th > button")) == len(find(opened, "#nodes th")) == 10
    reached = []
    while (here := focused(opened)).tag_name != "body" or not reached:
        here.send_keys(Keys.TAB)
        reached.append(focused(opened))
        assert len(reached) < 60
    ids = [element.get_attribute("id") for element in reached]
    assert "search" in ids
    for selector in ("#nodes button", "#filters input", "summary", ".scroll"):
        assert all(element in reached for element in find(opened, selector)), selector


def test_a_figure_is_drawn_to_a_file(tmp_path: Path) -> None:
    """A heat map with texts that look like markup: the file has them as text, and the size asked for."""
    figure = attribution(tokens=TOKENS).heatmap("q", over="position")
    save_figure(figure, tmp_path / "a.svg", width=500, height=300)
    drawn = (tmp_path / "a.svg").read_bytes()
    texts = ["".join(x.itertext()) for x in ElementTree.fromstring(drawn).findall(".//{*}text")]
    assert "0 <b>bold</b>" in texts and "2  שלום" in texts
    assert b'width="500" height="300"' in drawn


def test_curves_are_drawn_where_a_browser_is(tmp_path: Path) -> None:
    study = run_study([FakeCase("one")], tmp_path, PLAN)
    assert write_study(study, tmp_path)[-1] == tmp_path / "curves.png"
    drawn = (tmp_path / "curves.png").read_bytes()
    assert drawn.startswith(b"\x89PNG") and struct.unpack(">II", drawn[16:24]) == (1400, 450)
