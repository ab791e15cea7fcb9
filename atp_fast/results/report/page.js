const packed = Uint8Array.from(atob(document.getElementById("data").textContent), (c) => c.charCodeAt(0));
const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
const data = await new Response(stream).json();

// Prompts: a token's best nodes, under the pointer and at the keyboard's focus.
const tip = document.getElementById("tip");

function showTip(token) {
  tip.textContent = data.tips[token.dataset.column];
  tip.hidden = false;
  token.setAttribute("aria-describedby", "tip");
  const at = token.getBoundingClientRect();
  const below = at.bottom + tip.offsetHeight + 8 < innerHeight;
  tip.style.top = `${below ? at.bottom + 4 : at.top - tip.offsetHeight - 4}px`;
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - tip.offsetWidth - 8))}px`;
}

const described = () => document.querySelector("[aria-describedby=tip]");

function hideTip() {
  tip.hidden = true;
  described()?.removeAttribute("aria-describedby");
}

// Each prompt is one stop of the tab key; arrows walk along its tokens, in the direction it is written in.
function walk(event) {
  const token = event.target.closest(".token");
  if (!token) return;
  const tokens = [...token.closest(".prompt").querySelectorAll(".token")];
  const onward = getComputedStyle(token.parentElement).direction === "rtl" ? -1 : 1;
  const here = tokens.indexOf(token);
  const there = {
    ArrowRight: here + onward, ArrowLeft: here - onward, Home: 0, End: tokens.length - 1,
  }[event.key];
  if (event.key === "Enter" || event.key === " ") showTip(token);
  else if (there === undefined) return;
  else if (tokens[there]) {
    token.tabIndex = -1;
    tokens[there].tabIndex = 0;
    tokens[there].focus();
  }
  event.preventDefault();
}

const prompts = document.getElementById("prompts");
if (prompts) {
  for (const prompt of prompts.querySelectorAll(".prompt")) {
    for (const [place, token] of prompt.querySelectorAll(".token").entries()) {
      token.role = "button";
      token.tabIndex = place ? -1 : 0;
    }
  }
  const follow = (event) => {
    const token = event.target.closest(".token");
    hideTip();
    if (token) showTip(token);
  };
  prompts.addEventListener("mouseover", follow);
  prompts.addEventListener("focusin", follow);
  prompts.addEventListener("mouseleave", hideTip);
  prompts.addEventListener("focusout", hideTip);
  prompts.addEventListener("keydown", walk);
  addEventListener("scroll", () => described() && showTip(described()), {passive: true});
  addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
}

// The table: sorted by a click on a header, filtered by kind, searched.
const table = document.getElementById("nodes");
const body = table.tBodies[0];
const headers = [...table.tHead.rows[0].cells];
const scores = headers.findIndex((header) => header.dataset.type === "score");
const rows = [...body.rows].map((row) => {
  const cells = [...row.cells].map((cell) => cell.textContent);
  const [, kind, layer, index, place] = cells;
  const letter = kind === "neuron" ? "n" : kind.endsWith(".features") ? "f" : "h";
  const names = [`l${layer}`, `${letter}${index}`, `@${place}`];
  return {row, cells, kind, names, text: [kind, ...cells.slice(4, scores)].join(" ").toLowerCase()};
});

function sort(header) {
  const column = headers.indexOf(header);
  const {type} = header.dataset;
  const upwards = header.ariaSort === "none" ? type !== "score" : header.ariaSort === "descending";
  for (const other of headers) other.ariaSort = "none";
  header.ariaSort = upwards ? "ascending" : "descending";
  const sign = upwards ? 1 : -1;
  const value = ({cells}) => type === "text" ? cells[column] : parseFloat(cells[column]);
  rows.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    const missing = Number.isNaN(x) - Number.isNaN(y); // these stay last
    return missing || sign * ((x > y) - (x < y)) || a.cells[0] - b.cells[0];
  });
  body.append(...rows.map(({row}) => row));
}

function filter() {
  const terms = document.getElementById("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const kinds = new Set([...document.querySelectorAll("#filters :checked")].map((box) => box.value));
  let count = 0;
  for (const {row, kind, names, text} of rows) {
    // "l1" is a layer, and no part of "l12"
    const wanted = (term) => /^[lhnf@]\d+$/.test(term) ? names.includes(term) : text.includes(term);
    row.hidden = !(kinds.has(kind) && terms.every(wanted));
    count += !row.hidden;
  }
  document.getElementById("count").textContent = `${count} of ${rows.length} nodes`;
}

for (const header of headers) header.firstElementChild.addEventListener("click", () => sort(header));
document.getElementById("filters").addEventListener("input", filter);
document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
filter(); // a browser may have kept what was typed before a reload

// Figures, in the colours that the reader's system asks for.
const dark = matchMedia("(prefers-color-scheme: dark)");

function draw(id, name, label) {
  const element = document.getElementById(id);
  const figure = data.figures[name];
  element.hidden = !figure;
  if (!figure) return;
  const {data: traces, layout} = structuredClone(figure);
  if (id === "by-position") traces[0].x = data.columns;
  layout.template = data.templates[dark.matches ? "dark" : "light"];
  element.ariaLabel = label;
  Plotly.react(element, traces, layout, data.options);
}

function drawAll() {
  const {kind, score} = Object.fromEntries(new FormData(document.getElementById("choices")));
  draw("by-position", `position ${kind} ${score}`, `Map of ${kind} ${score}, layer by position`);
  draw("by-head", `head ${kind} ${score}`, `Map of ${kind} ${score}, layer by head`);
  if (data.figures.scatter) draw("scatter", "scatter", "Estimated against exact contributions");
}

document.getElementById("choices").addEventListener("change", drawAll);
dark.addEventListener("change", drawAll);
drawAll();
