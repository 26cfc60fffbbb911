"""Makes a run's data files from a named data set: from the Hugging Face hub, or from a local file or folder.

    python -m verl_trb.prepare_data --list
    python -m verl_trb.prepare_data openthoughts3 --check-overlap ~/data/verl_trb/aime24.parquet
    python -m verl_trb.prepare_data math500 aime24 aime25 amc23 olympiadbench
    python -m verl_trb.prepare_data dapo_math_17k --from dapo-math-17k.parquet
    python -m verl_trb.prepare_data reasoning_gym/chain_sum --limit 512 --seed 1

Each set becomes NAME.parquet in verl's format and NAME.manifest.json (see docs/data.md).
"""

import argparse
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from verl_trb.data import SYSTEM_PROMPT, output
from verl_trb.data.files import data_files, read_files
from verl_trb.data.hub import hub_rows
from verl_trb.data.overlap import EvaluationSets, evaluation_sets
from verl_trb.data.reasoning import make_problems
from verl_trb.data.select import Choice, Selection, select
from verl_trb.data.sources import REASONING_GYM, SOURCES, Source, find_source
from verl_trb.errors import UserError
from verl_trb.rewards.math import same_answer, verifies_itself

FOLDER = "~/data/verl_trb"
GENERATED = 1000  # problems of a reasoning-gym task


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 2 after one sentence on stderr."""
    options = _parser().parse_args(arguments)
    try:
        if options.list:
            print(_listing())
            return 0
        _check(options)
        sets = evaluation_sets(options.check_overlap) if options.check_overlap else None
        for name in options.dataset:
            if name.startswith(REASONING_GYM):
                prepare_generated(name, options)
            else:
                prepare_source(find_source(name), options, sets)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or options.out} cannot be read or written ({error.strerror}).", file=sys.stderr)
        return 2
    return 0


def prepare_source(source: Source, options: argparse.Namespace, sets: EvaluationSets | None) -> Path:
    """Makes one named set's files and says what was made. Raises UserError."""
    facts: dict[str, Any]
    if options.source:
        path = options.source.expanduser()
        files = data_files(path, source.split)
        rows = read_files(path, files)
        inside = {file.name if file == path else file.relative_to(path).as_posix(): file for file in files}
        facts = {"source": str(options.source), "files": {name: output.sha256(file) for name, file in inside.items()}}
    else:
        rows, commit = hub_rows(source, options.revision)
        facts = {"source": f"hub: {source.hub}", "config": source.config, "split": source.split, "revision": commit}
    check = not options.no_answer_check
    choice = Choice(
        limit=options.limit or source.limit,
        shuffle=options.shuffle,
        question_column=options.question_column,
        answer_column=options.answer_column,
        verifies=cache(verifies_itself) if check else None,
        same=same_answer if check else None,
        too_long=None if source.evaluation else _too_long(options),
        evaluation_sets=None if source.evaluation else sets,
        drop_overlap=options.drop_overlap,
    )
    chosen = select(rows, source, choice)
    if source.rows and chosen.complete and chosen.read != source.rows:
        chosen.notes.append(f"{chosen.read} rows were read, and {source.hub} is known to have {source.rows}")
    if choice.limit and len(chosen.kept) < choice.limit:
        chosen.notes.append(f"{len(chosen.kept)} rows could be used, fewer than the {choice.limit} wanted")
    made = [
        output.verl_row(source.name, source.split, index, kept, options.system)
        for index, kept in enumerate(chosen.kept)
    ]
    facts |= {"system_prompt": options.system, "limit": choice.limit, "shuffle": choice.shuffle}
    if options.tokenizer:
        facts |= {"tokenizer": options.tokenizer, "max_prompt_tokens": options.max_prompt_tokens}
    facts["overlap_checked_with"] = sets.names if sets and not source.evaluation else []
    return _write(source.name, made, facts, chosen, options)


def prepare_generated(name: str, options: argparse.Namespace) -> Path:
    """Makes the file of one reasoning-gym task and says what was made. Raises UserError."""
    task = name.removeprefix(REASONING_GYM)
    chosen, entries = make_problems(task, options.limit or GENERATED, options.seed)
    rows = [output.verl_row(name, "train", index, kept, options.system) for index, kept in enumerate(chosen.kept)]
    for row, entry in zip(rows, entries, strict=True):
        row["ability"] = "reasoning"
        row["extra_info"]["entry"] = entry
    import reasoning_gym

    facts = {
        "source": f"reasoning-gym {reasoning_gym.__version__}",
        "task": task,
        "seed": options.seed,
        "system_prompt": options.system,
    }
    return _write(name.replace("/", "_"), rows, facts, chosen, options)


def _write(name: str, rows: list[dict[str, Any]], facts: dict[str, Any], chosen: Selection, options: Any) -> Path:
    file = output.write(options.out.expanduser(), name, rows, facts, chosen)
    print(f"{name}: {len(rows)} of {chosen.read} rows read -> {file}")
    for why, count in chosen.reasons().items():
        print(f"  dropped {count}: {why}")
    if chosen.dropped:
        print(f"  each is listed in {file.with_suffix('.dropped.jsonl').name}")
    for evaluation, counts in output.overlap_counts(chosen).items():
        done = f", {options.drop_overlap} matches dropped" if options.drop_overlap else ", kept"
        print(f"  overlap with {evaluation}: {counts['exact']} exact, {counts['near']} near{done}")
    if facts.get("overlap_checked_with") and not chosen.matches:
        print(f"  no overlap with {', '.join(facts['overlap_checked_with'])}")
    for note in chosen.notes:
        print(f"  note: {note}")
    return file


def _too_long(options: argparse.Namespace) -> Callable[[str], bool] | None:
    """Whether a question's prompt has more than --max-prompt-tokens, by the chat template of --tokenizer."""
    if options.tokenizer is None:
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        output.prompt_tokens(tokenizer, "1", options.system)
    except Exception as error:  # transformers and chat templates raise many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"--tokenizer {options.tokenizer} cannot be used ({reason}).") from None
    return lambda question: output.prompt_tokens(tokenizer, question, options.system) > options.max_prompt_tokens


def _check(options: argparse.Namespace) -> None:
    if not options.dataset:
        raise UserError("Name a data set; --list shows them.")
    if options.source and len(options.dataset) > 1:
        raise UserError("--from gives the rows of one data set; name one.")
    if options.drop_overlap and not options.check_overlap:
        raise UserError("--drop-overlap needs the evaluation files: --check-overlap FILE ...")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit must be at least 1, got {options.limit}.")


def _listing() -> str:
    lines = [
        f"{source.name:15} {'evaluation' if source.evaluation else 'training':11} {source.hub}"
        + (f", {source.config}" if source.config else "")
        + f", split {source.split}"
        + (f" ({source.subset})" if source.subset else "")
        for source in SOURCES.values()
    ]
    return "\n".join([*lines, f"{REASONING_GYM}TASK generated here with reasoning-gym"])


def _parser() -> argparse.ArgumentParser:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        prog="prepare_data",
        description=lines[0],
        epilog="\n".join(lines[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("dataset", nargs="*", metavar="DATASET", help="a name of --list, or reasoning_gym/TASK")
    add("--list", action="store_true", help="the data sets that are known")
    add("--from", dest="source", type=Path, metavar="PATH", help="a local file or folder instead of the hub")
    add("--out", type=Path, default=Path(FOLDER), metavar="DIR", help=f"where files are written ({FOLDER})")
    add("--revision", default="main", help="branch, tag or commit on the hub (main; the manifest names the commit)")
    add("--limit", type=int, metavar="N", help="how many rows (the set's own number; reasoning-gym: 1000)")
    add("--shuffle", type=int, metavar="SEED", help="order rows by a hash of seed and question, not as they come")
    add("--seed", type=int, default=0, help="of reasoning-gym's problems")
    add("--system", default=SYSTEM_PROMPT, metavar="TEXT", help="system prompt (the paper's); '' for none")
    add("--question-column", metavar="NAME", help="where it is not found by itself")
    add("--answer-column", metavar="NAME")
    add("--check-overlap", type=Path, nargs="+", default=[], metavar="FILE", help="evaluation files to compare with")
    add("--drop-overlap", choices=["exact", "near"], default="", help="leave matching training rows out (near: both)")
    add("--tokenizer", metavar="MODEL", help="the student's folder or hub name: leave too long training prompts out")
    add("--max-prompt-tokens", type=int, default=1024, metavar="N", help="what is too long for it (1024, the paper's)")
    add("--no-answer-check", action="store_true", help="keep answers that math-verify cannot parse")
    return parser


if __name__ == "__main__":
    sys.exit(main())
