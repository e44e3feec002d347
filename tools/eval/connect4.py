"""`python -m tools.eval.connect4 --boards 500 --seed 1 --output F`: the paper's out-of-domain game, Connect4.

Two random agents play; positions of their games are kept once each, and those in which neither side could win at once
are at most a fifth. The model names every move that wins at once, for the side to move and for the opponent if it were
to move. A move is a column, counted from 1.

A side's stones are bits: cell (column c, height h), both from 0, is bit 7 * c + h. The seventh bit of a column is
always 0, so a line that is shifted over the upper edge does not continue in the next column.
"""

import argparse
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from spot_megatron.errors import PairError, positive_int
from spot_megatron.files import Row, write_rows
from tools.pairs.cli import STARTS_OVER, HelpFormatter, output_file, run_program
from tools.pairs.grade import CORRECT, NO_ANSWER, WRONG, Verdict

COLUMNS, ROWS = 7, 6
STONES = "xo"
QUIET_SHARE = 0.2  # of boards on which neither side can win at once
_STEP = ROWS + 1  # bits of a column
_FLOOR = sum(1 << _STEP * column for column in range(COLUMNS))
_CELLS = _FLOOR * ((1 << ROWS) - 1)
_DIRECTIONS = (_STEP, _STEP - 1, _STEP + 1)  # along a row, and along the two diagonals


@dataclass(frozen=True)
class Board:
    """`rows` are 6 texts of 7 characters, top row first: "." is empty."""

    id: str
    rows: tuple[str, ...]
    to_move: str
    winning: tuple[int, ...]
    opponent_winning: tuple[int, ...]


def winning_columns(own: int, other: int) -> tuple[int, ...]:
    """The columns, from 1, in which a stone of `own` completes four in a row."""
    taken = own | other
    landing = (taken + _FLOOR) & _CELLS  # the lowest empty cell of every column that is not full
    wins = _completing(own) & landing
    return tuple(column + 1 for column in range(COLUMNS) if wins >> _STEP * column & (1 << ROWS) - 1)


def _completing(own: int) -> int:
    """Cells that make four with three stones of `own`, whether they are empty or not."""
    cells = own << 1 & own << 2 & own << 3
    for step in _DIRECTIONS:
        for towards, away in ((own << step & own << 2 * step, -step), (own >> step & own >> 2 * step, step)):
            cells |= towards & _shift(own, -3 * away) | towards & _shift(own, away)
    return cells & _CELLS


def _shift(stones: int, by: int) -> int:
    return stones << by if by >= 0 else stones >> -by


def has_four(own: int) -> bool:
    for step in (1, *_DIRECTIONS):
        pairs = own & own >> step
        if pairs & pairs >> 2 * step:
            return True
    return False


def stones(rows: Sequence[str]) -> tuple[int, int]:
    """The bits of x and of o."""
    bits = {"x": 0, "o": 0, ".": 0}
    for row, text in enumerate(rows):
        for column, cell in enumerate(text):
            bits[cell] |= 1 << _STEP * column + ROWS - 1 - row
    return bits["x"], bits["o"]


def solve(rows: Sequence[str], to_move: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(columns that win for the side to move, columns that would win for its opponent)."""
    x, o = stones(rows)
    own, other = (x, o) if to_move == "x" else (o, x)
    return winning_columns(own, other), winning_columns(other, own)


def random_position(rng: random.Random) -> tuple[tuple[str, ...], str]:
    """A position of a game of two random agents, and who is to move.

    Of all positions in which the game is not over, one is drawn evenly; the empty board is left out.
    """
    sides, height, history = [0, 0], [0] * COLUMNS, list[tuple[int, int]]()
    for turn in range(COLUMNS * ROWS):
        column = rng.choice([column for column in range(COLUMNS) if height[column] < ROWS])
        sides[turn % 2] |= 1 << _STEP * column + height[column]
        height[column] += 1
        if has_four(sides[turn % 2]):
            break
        if turn < COLUMNS * ROWS - 1:
            history.append((sides[0], sides[1]))
    x, o = rng.choice(history)
    return _rows(x, o), STONES[(x | o).bit_count() % 2]


def _rows(x: int, o: int) -> tuple[str, ...]:
    def cell(row: int, column: int) -> str:
        bit = 1 << _STEP * column + ROWS - 1 - row
        return "x" if x & bit else "o" if o & bit else "."

    return tuple("".join(cell(row, column) for column in range(COLUMNS)) for row in range(ROWS))


def generate(num_boards: int, seed: int) -> Iterator[Board]:
    """Boards without duplicates, of which at most a fifth have no winning move. Equal arguments give equal boards."""
    rng, seen = random.Random(seed), set[tuple[str, ...]]()
    num_quiet = 0
    while len(seen) < num_boards:
        rows, to_move = random_position(rng)
        winning, opponent = solve(rows, to_move)
        quiet = not (winning or opponent)
        if rows in seen or (quiet and num_quiet + 1 > QUIET_SHARE * num_boards):
            continue
        seen.add(rows)
        num_quiet += quiet
        yield Board(f"connect4-{seed}-{len(seen):05d}", rows, to_move, winning, opponent)


def read_board(row: Row, where: str) -> Board:
    """A line of the file. Raises PairError for a board that no game can have, or whose known moves are not right."""
    rows, to_move = row.get("board"), row.get("to_move")
    if not (isinstance(rows, list) and len(rows) == ROWS and all(isinstance(text, str) for text in rows)):
        raise PairError(
            f"{where}: `board` must be a list of {ROWS} texts. Make boards by python -m tools.eval.connect4."
        )
    if any(len(text) != COLUMNS or set(text) - set(".xo") for text in rows):
        raise PairError(f"{where}: a row of `board` must be {COLUMNS} of the characters . x o")
    if to_move not in ("x", "o"):
        raise PairError(f"{where}: `to_move` must be x or o")
    if any(
        above != "." and below == "." for top, under in pairwise(rows) for above, below in zip(top, under, strict=True)
    ):
        raise PairError(f"{where}: a stone of `board` lies on no other")
    found = solve(rows, to_move)
    for name, moves in zip(("winning", "opponent_winning"), found, strict=True):
        if sorted(row.get(name, moves)) != list(moves):
            raise PairError(f"{where}: `{name}` is {row[name]}, and the solver finds {list(moves)}")
    return Board(str(row.get("id") or "/".join(rows)), tuple(rows), to_move, *found)


def prompt(board: Board) -> str:
    """The question, which says how the answer is written."""
    other = STONES[1 - STONES.index(board.to_move)]
    picture = "\n".join(" ".join(row) for row in board.rows)
    numbers = " ".join(str(column) for column in range(1, COLUMNS + 1))
    return (
        f"This is a position of Connect Four. The board has {ROWS} rows and {COLUMNS} columns; a dot is an empty cell, "
        "and the last line numbers the columns. A stone that is dropped into a column falls to its lowest empty cell. "
        f"Four stones of one side in a row, horizontally, vertically or diagonally, win.\n\n{picture}\n{numbers}\n\n"
        f"You are {board.to_move}, and it is your turn. Find every column in which your next stone wins at once. Find "
        f"also every column in which your opponent, {other}, would win at once if it were the opponent's turn now.\n"
        "Reason step by step, and end with this line, in which the first list holds your columns and the second list "
        "the opponent's; a list may be empty:\n"
        r"Therefore, the final answer is: $\boxed{[COLUMNS]; [COLUMNS]}$."
    )


def answer(board: Board) -> str:
    return f"{list(board.winning)}; {list(board.opponent_winning)}"


_LIST = re.compile(r"(?:\\[{]|[\[({])([^\[\](){}]*?)(?:\\[}]|[\])}])")


def parse_answer(contents: Sequence[str]) -> tuple[list[int], list[int]] | None:
    """The two lists of the final box, or of the final two boxes, sorted; None for anything else."""
    found = _LIST.findall(re.sub(r"\\(?:left|right|text|,|;)", "", "; ".join(contents)))
    if len(found) != 2:
        return None
    moves = []
    for text in found:
        parts = [part for part in re.split(r"[,\s]+", text.strip()) if part]
        if not all(part.isascii() and part.isdigit() and len(part) < 3 for part in parts):
            return None
        moves.append(sorted(map(int, parts)))
    return moves[0], moves[1]


def grade(board: Board, contents: Sequence[str]) -> Verdict:
    """Both lists must be the solver's, as multisets: the order is free, a column named twice is wrong."""
    given = parse_answer(contents)
    if given is None:
        return Verdict(NO_ANSWER, "; ".join(contents), "not_two_lists")
    extracted = f"{given[0]}; {given[1]}"
    if extracted == answer(board):
        return Verdict(CORRECT, extracted, "same_moves")
    wrong = [
        name
        for name, a, b in zip(("own", "opponent"), given, (board.winning, board.opponent_winning), strict=True)
        if a != list(b)
    ]
    return Verdict(WRONG, extracted, f"other_{'_and_'.join(wrong)}_moves")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.eval.connect4", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("--boards", type=positive_int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="JSONL file")
    args = parser.parse_args()
    output_file(args.output, "--output")
    boards = list(generate(args.boards, args.seed))
    write_rows(
        args.output,
        (
            {
                "id": board.id,
                "board": list(board.rows),
                "to_move": board.to_move,
                "winning": list(board.winning),
                "opponent_winning": list(board.opponent_winning),
            }
            for board in boards
        ),
    )
    quiet = sum(not (board.winning or board.opponent_winning) for board in boards)
    print(f"{len(boards)} boards, {quiet} of them without a winning move: {args.output}")


if __name__ == "__main__":
    run_program(main, STARTS_OVER)
