"""In: text, token ids, files, tasks. Out: PromptPairs.

May import: nodes and the helpers beside it (files, extras).
"""

from atp_fast.prompts.directions import DIRECTIONS, Direction, directed, sign_text
from atp_fast.prompts.pairs import PromptPairs

__all__ = ["DIRECTIONS", "Direction", "PromptPairs", "directed", "sign_text"]
