"""Accuracy of models and checkpoints on sets of problems: pass@1 and pass@k, with confidence intervals.

    python -m verl_trb.evaluate runs/qwen3_1p7b --data math500 aime24 --n 64
    python -m verl_trb.evaluate runs/a runs/b teacher=Qwen/Qwen3-8B --data math500 amc23 --n 64
    python -m verl_trb.evaluate runs/quickstart --data val.parquet --n 4 --max-tokens 25

MODEL is a Hugging Face folder or hub name, a run's folder RUN (the model it started from and all its checkpoints), one
checkpoint RUN/checkpoints/global_step_N, or RUN/student; NAME=MODEL gives it a name. Temperature 1, nothing cut off;
prompts, ends and rewards are those of training. Every sample is kept, in OUT/MODEL/SET.jsonl: a command that was
stopped goes on where it was, and a larger --n only adds. OUT also gets results.json, results.md and results.png.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from verl_trb.errors import UserError

MAX_TOKENS = 8192  # the paper's
SCORERS = 8  # answers judged at one time; most wait for the sandbox
OUT, FOLDER, CACHE = "runs/evaluation", "~/data/verl_trb", "~/.cache/verl_trb"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 2 after one sentence on stderr, 1 if vLLM failed, 130 after Ctrl-C."""
    from verl_trb.evaluation.sampling import EngineFailed

    options = _parser().parse_args(arguments)
    try:
        _check(options)
        evaluate(options)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except EngineFailed as error:
        log = options.out / "evaluate.log"
        print(f"error: {error}; its output is in {log}, and the same command goes on where it was.", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or options.out} cannot be read or written ({error.strerror}).", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


def evaluate(options: argparse.Namespace) -> None:
    """Draws the samples that are missing, model after model, and writes and shows the results. Raises UserError."""
    from verl_trb.evaluation import models, problems

    sets = problems.read_sets(
        [problems.find_file(data, options.data_dir.expanduser()) for data in options.data], options.limit
    )
    rewards = {one.name: problems.reward_name(one, options.reward) for one in sets}
    functions = {name: problems.load_reward(name) for name in dict.fromkeys(rewards.values())}
    candidates = models.candidates(options.models)
    out: Path = options.out.expanduser()
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(out / ".lock").acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"Another evaluation is writing into {out}; wait for it, or choose a folder with --out."
        ) from None
    with lock, ExitStack() as stack:
        from verl_trb.quiet import quiet

        screen = Console(file=stack.enter_context(quiet(out / "evaluate.log")), highlight=False)
        results = []
        for candidate in candidates:
            results.append((candidate, _one_model(candidate, sets, rewards, functions, options, screen)))
            _write(results, out, options)
        _show(results, out, options, screen)


def _one_model(
    candidate: Any,
    sets: Sequence[Any],
    rewards: dict[str, str],
    functions: dict[str, Callable[..., Any]],
    options: argparse.Namespace,
    screen: Console,
) -> dict[str, Any]:
    """The scores of one model by set; starts an engine only if samples are missing."""
    from verl_trb.evaluation.problems import scorer
    from verl_trb.evaluation.results import score
    from verl_trb.evaluation.samples import Sample, SampleFile
    from verl_trb.evaluation.sampling import Request, sample_seed

    folder = options.out.expanduser() / candidate.name.replace("/", "_")
    with ExitStack() as stack:
        files = {}
        for one in sets:
            made_with = {
                "model": candidate.fingerprint,
                "problems": one.digest,
                "reward": rewards[one.name],
                "seed": options.seed,
                "temperature": 1.0,
                "max_tokens": options.max_tokens,
                "dtype": options.dtype or "the model's",
                "chat": options.chat,
            }
            file = SampleFile(folder / f"{one.name.replace('/', '_')}.jsonl", made_with)
            files[one.name] = stack.enter_context(file)
            if file.repaired:
                screen.print(f"note: {file.repaired}", soft_wrap=True)
        ids = {one.name: [problem.id for problem in one.problems] for one in sets}
        todo = {name: list(file.missing(ids[name], options.n)) for name, file in files.items()}
        total = sum(map(len, todo.values()))
        if total:
            engine, prompts = _engine(candidate, sets, options, screen, stack)
            by_key: dict[str, tuple[str, int, Any]] = {}
            requests: list[Request] = []
            for one in sets:
                known = {problem.id: problem for problem in one.problems}
                for id_, index in todo[one.name]:
                    key = str(len(requests))
                    by_key[key] = one.name, index, known[id_]
                    seed = sample_seed(options.seed, one.name, id_, index)
                    requests.append(Request(key, prompts[one.name, id_], seed))

            def judged(response: Any) -> tuple[str, Any]:
                name, index, problem = by_key[response.key]
                try:
                    value = scorer(functions[rewards[name]], problem)(response.text)
                except Exception as error:  # whatever a function of the user's raises
                    raise UserError(
                        f"The reward function {rewards[name]} failed on problem {problem.id!r} of {name} "
                        f"({type(error).__name__}: {error})."
                    ) from error
                return name, Sample(problem.id, index, value, response.tokens, response.finish, response.text)

            started, tokens = time.monotonic(), 0
            with ThreadPoolExecutor(SCORERS) as pool, _progress(screen) as progress:
                bar = progress.add_task(candidate.name, total=total)
                responses = engine.respond(requests, options.max_tokens)
                for name, sample in _in_pool(pool, judged, responses):
                    files[name].add(sample)
                    tokens += sample.tokens
                    progress.advance(bar)
            seconds = time.monotonic() - started
            from verl_trb.display import count, duration

            speed = f"{count(tokens)} tokens in {duration(seconds)}, {tokens / seconds:,.0f} a second"
            screen.print(f"{candidate.name}: {total} samples, {speed}", soft_wrap=True)
        else:
            screen.print(f"{candidate.name}: all samples are there")
        ks = options.k
        return {one.name: score(files[one.name].samples, ids[one.name], options.n, ks, options.seed) for one in sets}


def _engine(
    candidate: Any, sets: Sequence[Any], options: argparse.Namespace, screen: Console, stack: ExitStack
) -> tuple[Any, dict[tuple[str, str], list[int]]]:
    """The model's engine, to be closed with `stack`, and the token ids of every prompt by set and problem."""
    from verl_trb.evaluation import sampling
    from verl_trb.evaluation.models import folder_of
    from verl_trb.model_files import find_model

    say = partial(screen.print, soft_wrap=True)
    folder = folder_of(candidate, options.cache_dir, say)
    tokenizer = sampling.load_tokenizer(candidate.name, folder)
    prompts = {
        (one.name, problem.id): sampling.prompt_ids(tokenizer, problem.messages, options.chat)
        for one in sets
        for problem in one.problems
    }
    length = max(map(len, prompts.values())) + options.max_tokens
    model = find_model("model", folder)
    if model and model.max_positions and model.max_positions < length:
        raise UserError(
            f"The model {candidate.name} reads at most {model.max_positions} tokens, and the longest prompt with "
            f"--max-tokens={options.max_tokens} has {length}; lower it by {length - model.max_positions}."
        )
    say(f"{candidate.name}: starting vLLM")
    dtype = options.dtype or (model.config.get("dtype") or model.config.get("torch_dtype") if model else None) or "auto"
    engine = sampling.Engine(folder, tokenizer, dtype=dtype, length=length, options=options.engine)
    return stack.enter_context(engine), prompts


def _in_pool(pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Iterator[Any]) -> Iterator[Any]:
    """The results as they come, while further items are being made."""
    running: set[Future[Any]] = set()
    for item in items:
        running.add(pool.submit(work, item))
        done = {future for future in running if future.done()}
        running -= done
        yield from (future.result() for future in done)
    yield from (future.result() for future in running)


def _progress(screen: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} samples")
    return Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=screen, disable=not screen.is_terminal
    )


def _write(results: list[Any], out: Path, options: argparse.Namespace) -> None:
    from verl_trb.evaluation.results import as_json, draw, markdown

    settings = {"n": options.n, "seed": options.seed, "max_tokens": options.max_tokens, "limit": options.limit}
    record = {"settings": settings, "models": as_json(results, options.seed)}
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "results.md").write_text(markdown(results, options.seed))
    draw(results, options.seed, out / "results.png")


def _show(results: list[Any], out: Path, options: argparse.Namespace, screen: Console) -> None:
    from verl_trb.evaluation.results import table

    shown = table(results, options.seed)
    if not screen.is_terminal:
        screen.width = 10_000  # a table in a file keeps its lines
    screen.print("", shown, "", f"written: {out / 'results.json'}, results.md, results.png", sep="\n", soft_wrap=True)


def _check(options: argparse.Namespace) -> None:
    if options.n < 1 or options.max_tokens < 1 or (options.limit is not None and options.limit < 1):
        raise UserError("--n, --max-tokens and --limit must be at least 1.")
    if options.k is None:
        options.k = [1, *([options.n] if options.n > 1 else [])]
    if min(options.k) < 1 or max(options.k) > options.n:
        raise UserError(f"--k takes numbers from 1 to --n={options.n}, got {', '.join(map(str, options.k))}.")
    options.k = sorted({1, *options.k})
    options.engine, options.chat = _pairs("--engine", options.engine), _pairs("--chat", options.chat)


def _pairs(option: str, items: list[str]) -> dict[str, Any]:
    """KEY=VALUE items with values as JSON where they are, else as text."""
    found: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UserError(f"{option} takes KEY=VALUE, got {item!r}.")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _parser() -> argparse.ArgumentParser:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(
        prog="python -m verl_trb.evaluate",
        description=lines[0],
        epilog="\n".join(lines[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="a model, run or checkpoint, or NAME=it")
    add("--data", nargs="+", required=True, metavar="SET", help="data files, or names of sets that prepare_data made")
    add("--n", type=int, default=4, metavar="N", help="samples of each problem (4; the paper's: 32, 64 and 512)")
    add("--k", type=int, nargs="+", metavar="K", help="of pass@k (1 and N)")
    add("--max-tokens", type=int, default=MAX_TOKENS, metavar="N", help="longest response (8192, the paper's)")
    add("--seed", type=int, default=0, help="of samples and intervals: the same seed, the same numbers (0)")
    add("--limit", type=int, metavar="N", help="only the first N problems of each set, to try")
    add("--out", type=Path, default=Path(OUT), metavar="DIR", help=f"samples and results ({OUT})")
    add("--reward", metavar="MODULE:NAME", help="a reward function of verl's form, also FILE.py:NAME (the set's own)")
    add("--dtype", help="of weights and computation (the model's)")
    add("--engine", nargs="+", default=[], metavar="KEY=VALUE", help="vLLM's, such as tensor_parallel_size=2")
    add(
        "--chat", nargs="+", default=[], metavar="KEY=VALUE", help="of the chat template, such as enable_thinking=false"
    )
    add("--data-dir", type=Path, default=Path(FOLDER), metavar="DIR", help=f"where prepare_data wrote ({FOLDER})")
    add("--cache-dir", type=Path, default=Path(CACHE), metavar="DIR", help=f"of converted checkpoints ({CACHE})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
