"""The diagnostics on real (untrained) models: lockstep sampling and scores, one sequence at a time; the command."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ToyRun
from omegaconf import OmegaConf
from torch import Tensor
from transformers import AutoModelForCausalLM

from verl_trb import composition
from verl_trb.diagnose import main
from verl_trb.diagnostics.rollouts import Pair, Rollout, student_alone, teacher_alone

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(len(solution_str) % 2)}
"""


@pytest.fixture
def run(toy: ToyRun) -> Path:
    """A run's folder before its first step; half of the untrained student's rollouts are right."""
    (toy.folder / "reward.py").write_text(REWARD)
    configs: list = []
    reward = f"reward.custom_reward_function.path={toy.folder}/reward.py"
    composition.run(lambda config: configs.append(config) or 0, [*toy.overrides, reward])
    folder = toy.folder / "run"
    folder.mkdir()
    OmegaConf.save(configs[0], folder / "config.yaml", resolve=True)
    return folder


def likeliest(logp_student_BV: Tensor, logp_teacher_BV: Tensor) -> Tensor:
    """The token most likely to both, surely: no chance, and both models matter."""
    best_B = (logp_student_BV + logp_teacher_BV).argmax(-1)
    return torch.full_like(logp_student_BV, -torch.inf).scatter(-1, best_B[:, None], 0.0)


@torch.no_grad()
def logits(folder: Path, ids: list[int]) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0]


def test_padding_and_caches_change_nothing(run: Path, toy: ToyRun) -> None:
    pair = Pair(run, batch=2)
    prefixes = [[3, 11, 12, 13], [5, 10], [1, 2, 14, 15, 16, 17, 18], [9]]
    found = pair.continuations(prefixes, 6, likeliest)
    masked = list(pair.vocabulary.masked)
    for prefix, response in zip(prefixes, found, strict=True):
        ids = list(prefix)
        for token in response:
            both = torch.zeros(())
            for folder in (toy.student, toy.teacher):
                row = logits(folder, ids)[-1]
                row[masked] = -torch.inf
                both = both + row.log_softmax(-1)
            assert token == int(both.argmax())
            ids.append(token)
        assert len(response) == 6 or response[-1] == pair.vocabulary.student_eos


def test_scores_are_the_models(run: Path, toy: ToyRun) -> None:
    pair = Pair(run, batch=2)
    rollouts = [
        Rollout({}, [3, 11, 12], [4, 5, 6, 7], 0.0),
        Rollout({}, [1], [2, 19], 0.0),
        Rollout({}, [9, 9], [8], 0),
    ]
    masked = list(pair.vocabulary.masked)
    for rollout, score in zip(rollouts, pair.scores(rollouts), strict=True):
        for folder, values in ((toy.student, score.logp_student), (toy.teacher, score.logp_teacher)):
            rows = logits(folder, rollout.prompt + rollout.response).double()
            rows[:, masked] = -torch.inf
            logp = rows.log_softmax(-1)
            place = len(rollout.prompt) - 1
            naive = [float(logp[place + i, token]) for i, token in enumerate(rollout.response)]
            assert values == pytest.approx(naive, abs=1e-5)
        entropies = [
            -sum(p * p.log() for p in row.exp() if p > 0) for row in logp[place : place + len(rollout.response)]
        ]
        assert score.teacher_entropy == pytest.approx([float(h) for h in entropies], abs=1e-5)


def test_samples_follow_the_policy(run: Path) -> None:
    """First tokens after one prefix against mu, chi-squared; error rate 1e-3, seed fixed."""
    from scipy.stats import chi2

    pair = Pair(run, batch=1000)
    ((name, mix),) = list(pair.policies(1).items())[1:]
    assert name == "trb, epsilon = 0.05"
    prefix, n = [3, 11, 12, 13], 4000
    counts = torch.zeros(pair.vocabulary.size)
    for response in pair.continuations([prefix] * n, 1, mix):
        counts[response[0]] += 1
    logp = [pair._logp(model(torch.tensor([prefix])).logits[:, -1], role) for role, model in pair.models.items()]
    mu = mix(*logp)[0].exp()
    assert not torch.allclose(mu, logp[0][0].exp(), atol=1e-3), "the policy is not the student"
    seen = mu > 0
    statistic = float(((counts - n * mu)[seen] ** 2 / (n * mu)[seen]).sum())
    assert statistic < chi2.ppf(0.999, int(seen.sum()) - 1) and counts[~seen].sum() == 0


def test_policies_are_the_runs_at_that_step(run: Path) -> None:
    pair = Pair(run)
    assert list(pair.policies(16)) == ["student", "trb, epsilon = 0.025"]
    assert list(pair.policies(31)) == ["student"]
    log_S, log_T = torch.randn(3, 5).log_softmax(-1), torch.randn(3, 5).log_softmax(-1)
    assert student_alone(log_S, log_T) is log_S and teacher_alone(log_S, log_T) is log_T


@pytest.mark.parametrize("kind", ["continuation", "entropy", "auroc"])
def test_the_command_prints_draws_and_writes(run: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    assert main([kind, str(run), "--rollouts", "24", "--points", "2"]) == 0
    said = capsys.readouterr().out
    assert "student" in said and "trb, epsilon = 0.05" in said
    series = json.loads((run / "diagnostics" / f"{kind}.json").read_text())
    assert (run / "diagnostics" / f"{kind}.png").stat().st_size > 10_000
    if kind == "continuation":
        assert len(series) == 4 and all(list(curve) == ["0", "12"] for curve in series.values())
        assert all(
            0 <= point["low"] <= point["value"] <= point["high"] <= 1 for c in series.values() for point in c.values()
        )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["auroc", "nowhere"], "nowhere is no run"),
        (["auroc", "RUN", "--trained"], "has no trained student yet"),
        (["continuation", "RUN", "--step", "31"], "the rollouts of step 31 are the student's own"),
        (["entropy", "RUN", "--rollouts", "0"], "--rollouts must be at least 1"),
    ],
)
def test_wrong_commands_are_one_sentence(run: Path, capsys, arguments: list[str], says: str) -> None:
    assert main([str(run) if a == "RUN" else a for a in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said and "Traceback" not in said


def test_nothing_to_rank_is_one_sentence(run: Path, capsys) -> None:
    config = OmegaConf.load(run / "config.yaml")
    file = Path(config.reward.custom_reward_function.path)
    file.write_text("def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return 0.0\n")
    assert main(["auroc", str(run), "--rollouts", "8"]) == 2
    assert "error: student: all rollouts are wrong" in capsys.readouterr().err
