"""Rollouts: ours against plain vLLM of either model, and against a loop that calls both token by token.

    python scripts/bench_rollouts.py                       # batches 1, 4, 8, 16; about 12 minutes on 2 cores
    python scripts/bench_rollouts.py --batches 1 4         # a part of it
    python scripts/bench_rollouts.py --json rollouts.json  # adds the figures to a file, one line a run

The pair is that of bench_models.py, in --dtype: bfloat16 where the CPU multiplies it, else float32. Every side is a
process of its own, started once; they answer in turns, one at a time, repetition after repetition, and what is printed
are medians. Sides: `student` and `teacher` are plain vLLM (without log-probabilities); `ours` is one engine at every
number of drafts, fixed, chosen by itself (auto), and at epsilon = 0; `loop` is what one writes down with Hugging Face,
KV caches for both models and our solver.

    lockstep  1 / (1/student + 1/teacher) tokens a second: both models once a token, nothing else
    bound     tokens of a block / (drafts * student's pass + teacher's pass), timed inside our engine and averaged over
              all of its blocks, also the last ones, where some requests have ended; printed is the share of it that we
              reach. It is about blocks, so the passes over the prompts are left out of our time, too
    sampler   the share of our engine's time that goes into solver, acceptance and statistics
    sched.    the share outside the worker: scheduler and outputs, what asynchronous scheduling could hide at most
              (vLLM itself has none on a CPU)

One thread a process: two that wait for each other measure whatever else runs. Even so it wants the machine to itself;
where it cannot have it, --cpu-time counts the process's own seconds. Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_models import VOCABULARY, Models, make_models, native_dtype

EPSILON = 0.02
PROMPT, RESPONSE = 16, 48  # tokens; few in a prompt: a CPU computes long over what a GPU reads in a moment
CLOCK = time.process_time if os.environ.get("BENCH_CPU_TIME") else time.perf_counter
GAMMAS = (1, 2, 4, 6, 8)
TARGETS = {"lockstep": {1: 2.5, 4: 1.6, 16: 1.2}, "loop": {1: 4.0, 4: 3.0, 8: 2.3}, "bound": {1: 0.9, 4: 0.9}}


# --- the sides: each answers requests in its own process ---------------------------------------------------------


class Timed:
    """Wraps a method of an object: the time of every call, by the number of rows of its first tensor."""

    def __init__(self, owner: Any, name: str) -> None:
        self.call = getattr(owner, name)
        self.calls: list[tuple[int, float]] = []
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        start = CLOCK()
        result = self.call(*args, **kwargs)
        self.calls.append((len(tensors[0]) if tensors else 0, CLOCK() - start))
        return result

    def take(self) -> list[tuple[int, float]]:
        taken, self.calls = self.calls, []
        return taken


class Plain:
    """vLLM serving one model."""

    def __init__(self, model: Path, batch: int, dtype: str, response: int = RESPONSE, **overrides: Any) -> None:
        from vllm import LLM

        arguments = {
            "model": str(model),
            "dtype": dtype,
            "max_model_len": PROMPT + response + 32,
            "max_num_seqs": batch,
            "max_num_batched_tokens": 1024,
            "enforce_eager": True,
            "disable_log_stats": True,
            "kv_cache_memory_bytes": 1 << 29,
            "generation_config": "vllm",
        }
        self.llm = LLM(**{**arguments, **overrides})
        worker = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        self.runner = worker.model_runner
        self.worker_parts = Timed(self.runner, "execute_model"), Timed(self.runner, "sample_tokens")

    def generate(self, prompts: list[list[int]], each: list[dict[str, Any]]) -> tuple[int, float]:
        """Tokens and seconds; `each`: the sampling parameters of every prompt."""
        from vllm import SamplingParams

        params = [SamplingParams(temperature=1.0, ignore_eos=True, detokenize=False, **sampling) for sampling in each]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        for part in self.worker_parts:
            part.take()
        start = CLOCK()
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        seconds = CLOCK() - start
        return sum(len(output.outputs[0].token_ids) for output in outputs), seconds

    def scheduling(self, seconds: float) -> float:
        """Share of the time that the engine spent outside its worker: what asynchronous scheduling can hide at most."""
        return 1 - sum(s for part in self.worker_parts for _, s in part.take()) / seconds

    def measure(self, prompts: list[list[int]], request: dict[str, Any]) -> dict[str, Any]:
        each = [{"max_tokens": request["response"]}] * len(prompts)
        tokens, seconds = self.generate(prompts, each)
        return {"rate": tokens / seconds, "scheduling": self.scheduling(seconds)}


class Ours(Plain):
    """Our engine: the teacher's, with the student as its draft model."""

    def __init__(
        self, models: Models, batch: int, drafts: int, dtype: str, response: int = RESPONSE, size: int = VOCABULARY
    ) -> None:
        import verl_trb.platforms  # noqa: F401
        from verl_trb.rollout.engine_args import ENGINE_ENVIRONMENT, blended_engine_args, model_length

        os.environ.update({**ENGINE_ENVIRONMENT, "VERL_RAY_JOB_ID": f"bench-{os.getpid()}"})
        from verl.workers.rollout.vllm_rollout import utils

        utils.set_death_signal = lambda: None  # verl's: end with the engine's parent, which here is ours
        self.drafts, length = drafts, model_length(PROMPT, response, drafts)
        super().__init__(
            models.teacher,
            batch,
            dtype,
            logprobs_mode="processed_logprobs",
            skip_tokenizer_init=True,
            **{**blended_engine_args(str(models.student), drafts), "max_model_len": length},
        )
        vocabulary = {"size": size, "student_eos": 0, "teacher_eos": 0, "masked": (2,), "marker": 2}
        self.rpc("install_behavior_policy", policy="trb", vocabulary=vocabulary, adapt_drafts=True)
        runner = self.runner
        self.parts = {
            "teacher": (Timed(runner, "_model_forward"), Timed(runner.model, "compute_logits")),
            "student": (Timed(runner.drafter.model, "forward"), Timed(runner.drafter.model, "compute_logits")),
            "sampler": (Timed(runner.rejection_sampler.sampling, "draw"),),
        }

    def rpc(self, method: str, **settings: Any) -> Any:
        return self.llm.collective_rpc(method, kwargs=settings)[0]

    def measure(self, prompts: list[list[int]], request: dict[str, Any]) -> dict[str, Any]:
        from verl_trb.rollout.request import BlendedRequest

        drafts, epsilon, response = request.get("drafts"), request["epsilon"], request["response"]
        self.llm.reset_prefix_cache()
        self.rpc("skip_teacher", skipped=epsilon == 0)
        self.rpc("fix_draft_tokens", drafts=drafts)
        self.rpc("take_rollout_statistics")
        for timed in self.parts.values():
            for part in timed:
                part.take()
        params = {"epsilon": epsilon} if epsilon else None
        each = [
            {"extra_args": BlendedRequest(params, prompt[-1]).extra_args(), "logprobs": 0, "max_tokens": response + 1}
            for prompt in prompts
        ]
        tokens, seconds = self.generate([prompt[:-1] for prompt in prompts], each)
        tokens -= len(prompts)  # the forced ones
        sums = self.rpc("take_rollout_statistics")
        assert sums["tokens"] == tokens == len(prompts) * response, (sums, tokens)
        parts = {name: [part.take() for part in timed] for name, timed in self.parts.items()}
        models = [call for name in ("teacher", "student") for part in parts[name] for call in part]
        longest = len(prompts) * (drafts or self.drafts)  # rows of a block; a pass over prompts has more
        over_prompts = sum(s for rows, s in models if rows > longest)
        answer = {
            "rate": tokens / seconds,
            "tokens": tokens / sums["blocks"],
            "acceptance": sums["accepted"] / sums["verified"],
            "tv": sums["tv"] / sums["verified"],
            "sampler": sum(s for _, s in parts["sampler"][0]) / seconds,
            "scheduling": self.scheduling(seconds),
            "blocks": tokens / (seconds - over_prompts),
            "bound": tokens / (sum(s for _, s in models) - over_prompts),
        }
        if drafts:
            # Of whole blocks: `drafts` passes of the student over one token a row, one of the teacher over the drafts.
            student = sum(statistics.mean(s for rows, s in part if rows == len(prompts)) for part in parts["student"])
            block = [[s for rows, s in part if rows == len(prompts) * drafts] for part in parts["teacher"]]
            if all(block):
                teacher = sum(statistics.mean(part) for part in block)
                answer |= {"student_pass": student, "teacher_pass": teacher}
        return answer


class Loop:
    """Both models token by token, with KV caches: the outer loop that one writes down."""

    def __init__(self, models: Models, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self.models = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
            for folder in models
        ]

    def measure(self, prompts: list[list[int]], request: dict[str, Any]) -> dict[str, Any]:
        import torch

        from verl_trb.trust_region import blend

        response, start = request["response"], CLOCK()
        with torch.inference_mode():
            input_BT, caches = torch.tensor(prompts), [None, None]
            for _ in range(response):
                logps = []
                for i, model in enumerate(self.models):
                    output = model(input_BT, past_key_values=caches[i], use_cache=True, logits_to_keep=1)
                    caches[i] = output.past_key_values
                    logps.append(output.logits[:, -1].float().log_softmax(-1))
                input_BT = torch.multinomial(blend(logps[0], logps[1], EPSILON).log_mu.exp(), 1)
        return {"rate": len(prompts) * response / (CLOCK() - start)}


def serve(side: str, models: Models, options: argparse.Namespace) -> None:
    batch, drafts, dtype, response = max(options.batches), max(options.gammas), options.dtype, options.response

    def start() -> Any:
        if side == "loop":
            return Loop(models, dtype)
        if side == "ours":
            return Ours(models, batch, drafts, dtype, response)
        return Plain(getattr(models, side), batch, dtype, response)

    answer_requests(start, VOCABULARY)


def answer_requests(start: Callable[[], Any], size: int) -> None:
    """Answer requests, a line of JSON each; whatever else prints goes to the error stream."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    torch.manual_seed(0)
    engine = start()
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        prompts = torch.randint(4, size, (request["batch"], PROMPT)).tolist()
        print(json.dumps(engine.measure(prompts, request)), file=answers)


# --- the run -----------------------------------------------------------------------------------------------------


class Side:
    """A process that answers; its own messages go to a file, which is shown if it dies."""

    def __init__(self, command: list[str], threads: int, log: Path) -> None:
        self.log = log
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=pipe, stdout=pipe, stderr=log.open("w"), text=True, env=environment
        )
        self.ready = False

    def wait(self) -> Side:
        """Until it has started; several can start at the same time."""
        if not self.ready:
            self.ready = self.answer()["ready"]
        return self

    def ask(self, **request: Any) -> dict[str, Any]:
        self.send(**request)
        return self.answer()

    def send(self, **request: Any) -> None:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a side of the benchmark ended:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def cases(options: argparse.Namespace, batch: int) -> list[tuple[str, str, dict[str, Any]]]:
    """What is measured at a batch size: (name, side, request)."""
    found: list[tuple[str, str, dict[str, Any]]] = [("student", "student", {}), ("teacher", "teacher", {})]
    found += [(str(drafts), "ours", {"drafts": drafts, "epsilon": EPSILON}) for drafts in options.gammas]
    found += [("auto", "ours", {"epsilon": EPSILON}), ("zero", "ours", {"epsilon": 0.0})]
    return found + ([("loop", "loop", {})] if batch <= 8 and not options.no_loop else [])


def measure(options: argparse.Namespace) -> dict[int, dict[str, dict[str, float]]]:
    """Medians by batch size, case and quantity."""
    sides: dict[str, Side] = {}
    results: dict[int, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for side in sorted({side for batch in options.batches for _, side, _ in cases(options, batch)}):
                command = [__file__, "--serve", side, "--models", str(options.models), "--dtype", options.dtype]
                command += ["--batches", *map(str, options.batches), "--gammas", *map(str, options.gammas)]
                command += ["--response", str(options.response)]
                sides[side] = Side(command, options.threads, Path(folder) / f"{side}.log")
            for each in sides.values():
                each.wait()
            for batch in options.batches:
                runs: dict[str, list[dict[str, float]]] = {}
                for repetition in range(-1, options.repetitions):  # the first warms up
                    for name, side, request in cases(options, batch):
                        for _ in range(3 if repetition < 0 and name == "auto" else 1):  # it learns what steps cost
                            answer = sides[side].ask(batch=batch, response=options.response, **request)
                        print(f"  {batch} x {name}, {repetition}: {answer['rate']:.1f}", file=sys.stderr, flush=True)
                        if repetition >= 0:
                            runs.setdefault(name, []).append(answer)
                results[batch] = {
                    name: {key: statistics.median(each[key] for each in found) for key in found[0]}
                    for name, found in runs.items()
                }
                show(options, batch, results[batch])
        finally:
            for each in sides.values():
                each.close()
    return results


def show(options: argparse.Namespace, batch: int, result: dict[str, dict[str, float]]) -> None:
    """The figures of one batch size; `ratios` are added to the result."""
    rate = {name: values["rate"] for name, values in result.items()}
    lockstep = 1 / (1 / rate["student"] + 1 / rate["teacher"])
    result["lockstep"] = {"rate": lockstep}
    print(f"\nbatch {batch}: tokens/s: student {rate['student']:.0f}, teacher {rate['teacher']:.1f}, ", end="")
    print(f"ideal lockstep {lockstep:.1f}" + (f", loop {rate['loop']:.1f}" if "loop" in rate else ""))
    print("drafts  tokens/s  lockstep  loop   bound  sampler  sched.  tokens/block  accepted  TV     passes")
    for name in [*map(str, options.gammas), "auto"]:
        values = result[name]
        values["to_lockstep"] = rate[name] / lockstep
        if "loop" in rate:
            values["to_loop"] = rate[name] / rate["loop"]
        values["to_bound"] = values["blocks"] / values["bound"]
        loop = f"{values['to_loop']:.2f}×" if "to_loop" in values else "–"
        passes = ""
        if "student_pass" in values:
            passes = f"{1e3 * values['student_pass']:.1f} ms, {1e3 * values['teacher_pass']:.1f} ms"
        shares = f"{values['to_bound']:5.1%}  {values['sampler']:7.1%}  {values['scheduling']:6.1%}"
        block = f"{values['tokens']:12.2f}  {values['acceptance']:8.1%}  {values['tv']:.3f}"
        ratio = f"{values['to_lockstep']:7.2f}×  {loop:5}"
        print(f"{name:6}  {rate[name]:8.1f}  {ratio}  {shares}  {block}  {passes}")
    fixed = max(rate[str(drafts)] for drafts in options.gammas)
    result["auto"]["to_fixed"], result["zero"]["to_student"] = rate["auto"] / fixed, rate["zero"] / rate["student"]
    print(f"auto against the best fixed: {rate['auto'] / fixed:.2f}×;", end=" ")
    print(f"epsilon = 0: {rate['zero']:.0f} tokens/s, {rate['zero'] / rate['student']:.2f}× the student", flush=True)


def verdict(results: dict[int, dict[str, dict[str, float]]]) -> int:
    """Every target with what was measured; how many are missed."""
    missed, rows = 0, []
    for batch, result in results.items():
        auto, names = result["auto"], [n for n in result if n.isdigit()]
        best = max(names, key=lambda n: result[n]["rate"])
        for against, targets in TARGETS.items():
            source = result[best] if against == "bound" else auto
            if batch in targets and f"to_{against}" in source:
                rows.append((f"batch {batch} against {against}", source[f"to_{against}"], targets[batch]))
        rows.append((f"batch {batch} auto against best fixed", auto["to_fixed"], 0.95))
        rows.append((f"batch {batch} epsilon = 0 against student", result["zero"]["to_student"], 0.9))
        if batch == 16 and "4" in result:
            rows.append(("batch 16, 4 drafts: the rest beside the sampler", 1 - result["4"]["sampler"], 0.9))
    print()
    for what, measured, target in rows:
        missed += measured < target
        print(f"{'ok    ' if measured >= target else 'MISSED'}  {what}: {measured:.2f}, target {target}")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--gammas", type=int, nargs="+", default=GAMMAS)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--response", type=int, default=RESPONSE, help="tokens of a response")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=native_dtype())
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, not the clock's: on a machine in use")
    parser.add_argument("--no-loop", action="store_true", help="leave out the Hugging Face loop")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "verl_trb_bench_models")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    models = make_models(options.models)
    if options.serve:
        serve(options.serve, models, options)
        return
    clock = "CPU time" if options.cpu_time else "clock time"
    print(
        f"{options.dtype}, {clock}, {options.threads} threads, {PROMPT} + {options.response} tokens, "
        f"epsilon = {EPSILON}",
        flush=True,
    )
    if options.cpu_time:
        os.environ["BENCH_CPU_TIME"] = "1"
    results = measure(options)
    if options.json:
        with options.json.open("a") as file:
            measured: dict[Any, Any] = {"dtype": options.dtype, "clock": clock, "response": options.response, **results}
            print(json.dumps(measured), file=file)
    sys.exit(1 if verdict(results) else 0)


if __name__ == "__main__":
    main()
