"""Rewards of answers, right and wrong, and what a reward of somebody's own may do wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from illada.errors import IlladaError
from illada.post_training.rewards import REWARDS, Judge, countdown, find_reward, sudoku

SUDOKU = {"puzzle": "3102 2000 0210 0320", "answer": "3142 2431 4213 1324"}
COUNTDOWN = {"numbers": [30, 100, 93], "target": 23}


@pytest.mark.parametrize(
    ("name", "problem", "answer", "reward"),
    [
        ("exact", {"answer": "a b"}, " a  b\n", 1),
        ("exact", {"answer": "a b"}, "a b c", 0),
        ("exact", {"answer": "a", "accepted": ["b"]}, "b", 1),
        ("number", {"answer": "#### 1,234"}, "so it is 1234.", 1),
        ("number", {"answer": "7"}, "7 or 8", 0),
        ("number", {"answer": "7"}, "none", 0),
        ("formula", {"answer": "\\frac{1}{2}"}, "hence \\boxed{0.5}", 1),
        ("formula", {"answer": "x+1"}, "first\n1+x", 1),
        ("formula", {"answer": "x+1"}, "", 0),
        ("program", {"tests": ["assert f(1) == 2", "assert f(2) == 2"]}, "```python\ndef f(x):\n    return 2\n```", 1),
        ("program", {"tests": ["assert f(1) == 1", "assert f(2) == 2"]}, "def f(x): return 2", 0.5),
        ("program", {"tests": ["assert f(1) == 1"]}, "import os; os.system('echo')", 0),
        ("sudoku", SUDOKU, "3142\n2431\n4213\n1324", 1),
        ("sudoku", SUDOKU, "3142\n2431\n4213\n1323", 0.875),
        ("sudoku", SUDOKU, "3142", 0),
        ("sudoku", SUDOKU, "1142\n2431\n4213\n1324", 0),
        ("sudoku", {**SUDOKU, "accepted": ["3142243142131322"]}, "3142\n2431\n4213\n1322", 1),
        ("countdown", COUNTDOWN, "93 - (100 - 30)", 1),
        ("countdown", COUNTDOWN, "thus:\n93 - 100 + 30 = 23", 1),
        ("countdown", COUNTDOWN, "93 + 100 + 30", 0.1),
        ("countdown", COUNTDOWN, "93 - 70", 0),
        ("countdown", COUNTDOWN, "30 / (100 - 93 - 7)", 0),
        ("countdown", COUNTDOWN, "__import__('os') + 30 + 93 + 100", 0.1),
        ("countdown", {"numbers": [9, 9], "target": 9}, "9 ** 9", 0.1),
        ("countdown", COUNTDOWN, "", 0),
    ],
)
def test_the_rewards(name, problem, answer, reward):
    assert REWARDS[name](problem, answer) == pytest.approx(reward)


@pytest.mark.slow
@given(st.text(max_size=300))
def test_any_text_has_a_reward(answer):
    assert 0 <= countdown(COUNTDOWN, answer) <= 1
    assert 0 <= sudoku(SUDOKU, answer) <= 1
    assert REWARDS["number"]({"answer": "7"}, answer) in (0, 1)
    assert REWARDS["formula"]({"answer": "7"}, answer) in (0, 1)


def test_a_reward_that_does_not_exist_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_reward.py").write_text("1 / 0\n")
    (tmp_path / "own_reward.py").write_text("length = 3\ndef long(problem, answer): return len(answer)\n")
    for name, words in (
        ("perfect", "no reward 'perfect': choose from exact"),
        ("nowhere:f", "cannot be imported: ModuleNotFoundError"),
        ("broken_reward:f", "cannot be imported: ZeroDivisionError"),
        ("own_reward:f", "cannot be imported: AttributeError"),
        ("own_reward:length", "is no function"),
    ):
        with pytest.raises(IlladaError, match=words):
            find_reward(name)
    assert find_reward("own_reward:long")({}, "four") == 4


@pytest.mark.slow
def test_the_judge_adds_up_and_stops_what_does_not_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd_rewards.py").write_text(
        "import os, time\n"
        "def long(problem, answer): return len(answer)\n"
        "def raises(problem, answer): return problem['nothing']\n"
        "def nan(problem, answer): return float('nan')\n"
        "def text(problem, answer): return 'good'\n"
        "def hangs(problem, answer): time.sleep(1000)\n"
        "def leaves(problem, answer): os._exit(3)\n"
    )
    problems = [{"answer": "yes"}, {"answer": "no"}]
    with Judge({"exact": 1.0, "odd_rewards:long": -0.1}, 10) as judge:
        found = judge(problems, ["yes", "yes"])
    assert found[0] == {"exact": 1.0, "odd_rewards:long": 3.0, "reward": pytest.approx(0.7)}
    assert found[1]["reward"] == pytest.approx(-0.3)
    for name, words in (
        ("raises", "given the answer 'yes', raised KeyError"),
        ("nan", "is nan, which is no finite number"),
        ("text", "is \"'good'\", which is no finite number"),
        ("hangs", "took more than 0.2 seconds"),
        ("leaves", "ended its process"),
    ):
        with (
            Judge({f"odd_rewards:{name}": 1.0}, 0.2 if name == "hangs" else 10) as judge,
            pytest.raises(IlladaError, match=words),
        ):
            judge(problems[:1], ["yes"])
    with pytest.raises(IlladaError, match="no reward"), Judge({"none": 1.0}, 1):
        pass


def test_each_problem_has_its_own_reward():
    """Of several tasks, and of held-out problems that name none."""
    problems = [
        {"prompt": "a", "answer": "yes", "reward": "exact"},
        {"prompt": "b", "numbers": [1, 2], "target": 3},
        {"prompt": "c", "answer": "yes"},
    ]
    with Judge({"exact": 1.0, "countdown": 1.0}, 60, own=True) as judge:
        assert judge(problems, ["yes", "1 + 2", "no"]) == [{"reward": 1.0}, {"reward": 1.0}, {"reward": 0.0}]


def test_a_problem_that_lacks_what_its_reward_needs_is_one_line():
    with Judge({"exact": 1.0}, 60) as judge, pytest.raises(IlladaError, match="needs 'answer' in every problem"):
        judge([{"prompt": "a"}], ["yes"])
