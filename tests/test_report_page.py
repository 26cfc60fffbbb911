"""The report's page: complete, self-contained, and harmless whatever a rollout, a folder or a setting contains."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from verl_trb.report.page import page
from verl_trb.report.samples import read_samples
from verl_trb.report.settings import differences
from verl_trb.training.samples import SampleRecorder, sample_steps

EVIL = "</div><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>&amp;"


def write_run(folder: Path, samples: list[dict] | None = None, **trb: Any) -> Path:
    folder.mkdir(parents=True)
    rows: list[dict] = [{"step": 0, "val/accuracy": 0.1}]
    for step in range(1, 5):
        row = {"step": step, "trb/epsilon": 0.1, "trb/kl/mean": 0.05, "trb/kl/max": 0.1, "trb/acceptance": 0.9}
        row |= {"trb/beta/mean": 0.5, "trb/tokens_per_teacher_pass": 3.0, "trb/reverse_kl": 1 / step}
        row |= {"trb/student_entropy": 1.0, "trb/teacher_entropy": 0.5, "trb/teacher_logprob": -1.0}
        row |= {"response_length/mean": 20.0, "response_length/max": 25.0, "timing_s/step": 2.0, "timing_s/gen": 1.0}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"trb": {"policy": "trb", "epsilon": 0.1, "warmup_steps": 8, "run_dir": str(folder), **trb}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    if samples is not None:
        (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


def sample(**values: Any) -> dict:
    plain = {"step": 1, "prompt": "1+1=", "policy": "trb", "tokens": ["2", " !"], "corrected": [True, False]}
    plain |= {"drafts": ["3", None], "logp_student": [-2.5, -0.1], "log_mu": [-0.5, -0.1], "finished": True}
    return plain | values


class Tags(HTMLParser):
    """Every tag with its attributes, and the text that is shown."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_eight_figures_and_all_sections(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [sample()], epsilon=e) for name, e in (("a", 0.1), ("b", 0.2))]
    html = page(runs)
    tags = Tags(html)
    assert [tag for tag, _ in tags.tags].count("figure") == 8
    for word in ("TRB ε₀=0.1 K=8", "TRB ε₀=0.2 K=8", "Curves", "Rollouts", "Settings", "trb.epsilon", "1+1="):
        assert word in tags.text
    # What the figures show is text, in the page's colours; the ids that they refer to exist.
    assert "Reverse KL" in tags.text and "var(--run1)" in html
    ids = [attributes["id"] for _, attributes in tags.tags if "id" in attributes]
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', html))
    assert used and used <= set(ids)


def test_one_step_of_each_run_that_recorded_it(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, epsilon=e) for name, e in (("a", 0.1), ("b", 0.2), ("c", 0.3))]
    assert "One step" not in page(runs)
    for run, seconds in zip(runs[:2], (1.0, 3.0), strict=True):
        spans = [["trainer", "gen", 0.0, 0.6], ["worker", "teacher", 0.7, 0.9]]
        steps = [{"step": step, "seconds": seconds * step, "spans": spans} for step in (1, 2, 3, 4)]
        (run / "timeline.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    html = page(runs)
    tags = Tags(html)
    assert [tag for tag, _ in tags.tags].count("figure") == 10
    for words in ("Step 3: 3.00 s", "Step 3: 9.00 s", "waiting for rollouts", "teacher's pass"):
        assert words in tags.text
    assert not {"script", "img", "image"} & {tag for tag, _ in tags.tags}
    ids = [attributes["id"] for _, attributes in tags.tags if "id" in attributes]
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', html)) <= set(ids)


def test_nothing_is_fetched_and_nothing_runs(tmp_path: Path) -> None:
    html = page([write_run(tmp_path / "a", [sample()])])
    for tag, attributes in Tags(html).tags:
        assert tag not in ("script", "iframe", "link", "object", "img")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "data", "style"):
                assert "//" not in (value or "")
    assert "default-src 'none'" in html and "@import" not in html


def test_whatever_a_run_contains_is_shown_as_text(tmp_path: Path) -> None:
    evil = sample(prompt=EVIL, policy=EVIL, tokens=[EVIL, EVIL], drafts=[EVIL, None])
    first = write_run(tmp_path / "x<b>y", [evil], method=EVIL, policy="skd")
    second = write_run(tmp_path / "b", [evil], method="skd", policy="skd", extra={EVIL: EVIL})
    tags = Tags(page([first, second]))
    assert not {"script", "img", "b>y"} & {tag for tag, _ in tags.tags}
    assert not any(name.startswith("on") for _, attributes in tags.tags for name in attributes)
    assert tags.text.count(EVIL) >= 8  # prompt, policy, tokens, draft, name, key and value


def test_corrections_are_marked(tmp_path: Path) -> None:
    html = page([write_run(tmp_path / "a", [sample(), sample(policy="student", corrected=[False] * 2)])])
    assert re.search(r"<del>3</del><ins title=[^>]*-2\.50, log μ -0\.50[^>]*>2</ins> !", html)
    assert html.count("<ins title") == 1 and "1 corrected" in html
    assert "+1.000 a token" in html  # the mean of log mu - log pi_S: (2 + 0) / 2


def test_runs_without_samples_or_settings_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "config.yaml").unlink()
    html = page([run])
    assert "Rollouts" not in html and "Settings" not in html


def test_samples_of_a_resumed_run_the_last_ones_count(tmp_path: Path) -> None:
    rows = [sample(step=4), sample(step=1), sample(step=1, tokens=["7", "8"]), sample(step=2, drafts=["short"])]
    run = write_run(tmp_path / "a", rows)
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 9, "pro')
    assert [(s.step, s.tokens) for s in read_samples(run)] == [(1, ["7", "8"]), (4, ["2", " !"])]
    assert read_samples(tmp_path) == []


def test_differences_are_by_key_ours_first(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", epsilon=0.1)
    b = write_run(tmp_path / "b", epsilon=0.2, topk=16)
    with (a / "config.yaml").open("a") as file:
        file.write("data: {seed: 1}\n")
    assert differences([a, b]) == {"trb.epsilon": ["0.1", "0.2"], "trb.topk": ["—", "16"], "data.seed": ["1", "—"]}
    assert list(differences([a, b])) == ["trb.epsilon", "trb.topk", "data.seed"]


@pytest.mark.parametrize(
    ("last_guided", "total", "steps"),
    [(30, 40, {1, 15, 30, 40}), (None, 40, {1, 20, 40}), (50, 3, {1, 2, 3}), (1, 5, {1, 5}), (2, 400, {1, 2, 400})],
)
def test_steps_whose_rollouts_are_kept(last_guided: int | None, total: int, steps: set[int]) -> None:
    assert sample_steps(last_guided, total) == steps


def test_no_prompts_no_samples(tmp_path: Path) -> None:
    trb = SimpleNamespace(run_dir=tmp_path, policy="trb", guided_steps=None, warmup_steps=5, sample_prompts=0)
    config = SimpleNamespace(trb=trb, data={})
    assert not SampleRecorder(config, None, [{"raw_prompt": []}], total_steps=9).due(1)
