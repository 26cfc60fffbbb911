"""A fuzzer guided by coverage for everything that reads a file: needs `pip install '.[fuzz]'` (atheris).

    .venv/bin/python scripts/fuzz.py                          # all targets, one after the other, 60 seconds each
    .venv/bin/python scripts/fuzz.py jsonl -max_total_time=600    # one target; the rest are libFuzzer's options

A target writes the fuzzer's bytes into a file and hands it to the program's own reader. Anything but a result or a
UserError of one sentence is a crash, which libFuzzer saves as crash-… in the present folder.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 60
TARGETS = ("jsonl", "parquet", "json", "csv", "manifest", "metrics")
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))


def read_training_file(name: str, data: bytes) -> None:
    from omegaconf import OmegaConf

    from verl_trb.data_files import check_rows, read_rows

    file = FOLDER / name
    file.write_bytes(data)
    columns = OmegaConf.create({"prompt_key": "prompt", "reward_fn_key": "data_source"})
    check_rows(file, read_rows(file), columns)


def read_source_file(name: str, data: bytes) -> None:
    from verl_trb.data.files import data_files, read_files

    file = FOLDER / name
    file.write_bytes(data)
    for _ in read_files(file, data_files(file, "train")):
        pass


def read_manifest(data: bytes) -> None:
    from verl_trb import checkpoints

    folder = FOLDER / "global_step_1"
    folder.mkdir(exist_ok=True)
    (folder / checkpoints.MANIFEST).write_bytes(data)
    checkpoints.find(FOLDER)


def read_metrics_file(data: bytes) -> None:
    from verl_trb.report import read_metrics

    (FOLDER / "metrics.jsonl").write_bytes(data)
    try:
        read_metrics(FOLDER)
    except ValueError as error:  # its way to say that there is no step
        if type(error) is not ValueError:
            raise


def one(target: str, data: bytes) -> None:
    from verl_trb.errors import UserError

    try:
        match target:
            case "jsonl" | "parquet":
                read_training_file(f"train.{target}", data)
            case "json" | "csv":
                read_source_file(f"rows.{target}", data)
            case "manifest":
                read_manifest(data)
            case "metrics":
                read_metrics_file(data)
    except UserError as error:
        if not str(error) or "Traceback" in str(error):
            raise


def seeds(target: str) -> Path:
    """A folder with a sound file to begin from."""
    folder = FOLDER / "corpus"
    folder.mkdir(exist_ok=True)
    row = '{"prompt": [{"role": "user", "content": "a"}], "data_source": "x", "reward_model": {"ground_truth": "b"}}'
    text = {
        "jsonl": f"{row}\n{row}\n",
        "json": f"[{row}]",
        "csv": 'a,b\n1,"2\n3"\n',
        "manifest": '{"files": {"actor/a.pt": 3}}',
        "metrics": '{"step": 1, "trb/epsilon": 0.1}\n',
    }
    if target == "parquet":
        import json

        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([json.loads(row)]), folder / "seed")
    else:
        (folder / "seed").write_text(text[target])
    return folder


def main() -> int:
    if len(sys.argv) == 1:
        limit = f"-max_total_time={SECONDS}"
        return max(subprocess.run([sys.executable, __file__, target, limit]).returncode for target in TARGETS)
    target = sys.argv[1]
    if target not in TARGETS:
        raise SystemExit(f"There is no target {target!r}; choose from {', '.join(TARGETS)}.")
    try:
        import atheris
    except ImportError:
        raise SystemExit("atheris is not installed: pip install '.[fuzz]'") from None
    import pyarrow.parquet  # noqa: F401  not instrumented: it is C++

    with atheris.instrument_imports(include=["verl_trb", "json", "csv"]):
        import verl_trb.checkpoints
        import verl_trb.data.files
        import verl_trb.data_files
        import verl_trb.report  # noqa: F401
    atheris.Setup([sys.argv[0], *sys.argv[2:], str(seeds(target))], lambda data: one(target, data))
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
