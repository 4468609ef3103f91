"""The `megagpt` command, and `pretrain`, which launch/pretrain.py calls: dispatch, nothing else.

Imports stand inside the functions so that --help answers at once.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megagpt.arguments import command_line, training_arguments
from megagpt.errors import OwnRankError, UserError
from megagpt.terminal import escape_unknown_letters

SAVED_AND_WANTS_RESTART = 75  # EX_TEMPFAIL of sysexits.h


def pretrain(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code: 0 finished, 2 what the user gave is wrong, 75 saved and wants to go on."""
    args = training_arguments().parse_intermixed_args(argv)
    if args.sample_report is not None:
        return _or_2(lambda: _sample_report(args))

    from megagpt.launcher import check_hostfile, watch
    from megagpt.preemption import Preemption

    preemption = Preemption(launcher_alive=watch(), ctrl_c=True)  # before torch, so that no signal is missed
    from megagpt.distributed import is_main, say, together
    from megagpt.processor import fitting
    from megagpt.rendezvous import agree, check_shared, meet
    from megagpt.run_file import leaves, load_run_config

    try:
        check_hostfile()
        device = meet()
        run = together(lambda: load_run_config(args.deepspeed_config, args.overrides))
        agree(dict(leaves(run.as_json())), "give all ranks the same run file and overrides")
        check_shared(run.megagpt.out_dir)
        # after the run file is found right, because DeepSpeed takes seconds to import
        from megagpt.lint import refuse
        from megagpt.out_of_memory import explained
        from megagpt.trainer import train

        for warning in together(lambda: refuse(run)):
            say(warning)
        run = fitting(run, device)
        with explained(run, device):
            state = train(run, device, fresh=args.fresh, preemption=preemption)
    except UserError as error:
        if is_main() or isinstance(error, OwnRankError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0 if state.finished(run.megagpt.schedule.max_steps) else SAVED_AND_WANTS_RESTART


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line()
    args, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in args or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # which argparse does not collect behind an option of a command
        args.overrides += rest
    return _or_2(lambda: COMMANDS[args.command](args))


def _or_2(command: Callable[[], int]) -> int:
    """The command's exit code; 2 and one line for what the user gave that is wrong."""
    escape_unknown_letters()
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _sample_report(args: argparse.Namespace) -> int:
    from megagpt.run_file import load_run_config
    from megagpt.sample_report import sample_report

    print(sample_report(load_run_config(args.deepspeed_config, args.overrides), args.sample_report, fresh=args.fresh))
    return 0


def _checkpoints(args: argparse.Namespace) -> int:
    from megagpt.checkpoint_list import checkpoint_table

    table, any_whole = checkpoint_table(args.run_dir, hashes=args.verify)
    print(table)
    return 0 if any_whole else 2


def _check_hosts(args: argparse.Namespace) -> int:
    from megagpt.launcher import check_environment, check_hosts

    check_hosts(args.hostfile)
    check_environment(Path.cwd())
    return 0


def _plan(args: argparse.Namespace) -> int:
    from megagpt import plan, plan_report
    from megagpt.lint import refuse
    from megagpt.run_file import load_run_config

    if args.memory and not args.probe:
        raise UserError("--memory limits the steps that --probe takes; add --probe, or choose --gpu")
    run = load_run_config(args.run_file, args.overrides)
    for warning in refuse(run):
        print(warning, file=sys.stderr)
    on = plan.machine(
        args.gpu, args.ranks, args.network, plan.EFFICIENCY if args.efficiency is None else args.efficiency
    )
    vocab = plan.vocabulary(run)
    if args.probe:
        from megagpt.probe import probe, probe_report

        candidates = plan.micro_batches(run, args.ranks)
        tries = probe(args.run_file, args.overrides, candidates, vocab[0], ranks=args.ranks, gib=args.memory)
        print(probe_report(tries, run))
        return 0
    found = list(plan.settings(run, on, vocab[0]))
    tokens = args.tokens or run.megagpt.schedule.max_steps * run.deepspeed.train_batch_size * run.megagpt.seq_len
    if args.json:
        print(json.dumps(plan_report.as_json(on, vocab, found, tokens)))
    else:
        print(plan_report.report(run, on, vocab, found, tokens))
    return 0


def _lint(args: argparse.Namespace) -> int:
    from megagpt.lint import effective, lint_file
    from megagpt.plan import vocabulary
    from megagpt.run_file import load_run_config

    found = lint_file(args.run_file, args.overrides, ranks=args.ranks)
    wrong = any(finding.level == "error" for finding in found)
    shown = None
    if args.effective and not wrong:
        run = load_run_config(args.run_file, args.overrides)
        shown = effective(run, vocabulary(run)[0], args.ranks)
    if args.json:
        rows = [{"level": finding.level, "key": finding.key, "text": finding.text} for finding in found]
        print(json.dumps({"findings": rows} | ({} if shown is None else {"effective": shown})))
    else:
        lines = [f"{args.run_file}: {finding}" for finding in found]
        print("\n".join(lines or [f"{args.run_file}: nothing to say"]))
        if shown is not None:
            print(json.dumps(shown, indent=2))
    return 2 if wrong else 0


def _slurm(args: argparse.Namespace) -> int:
    from megagpt.slurm import batch_script, submit

    more = {name: value for name in ("partition", "account") if (value := getattr(args, name)) is not None}
    more |= {name: value for name, _, value in (option.partition("=") for option in args.sbatch)}
    script = batch_script(
        args.run_file,
        args.overrides,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        time=args.time,
        more=more,
        sweep=args.sweep,
        container=args.container,
        fresh=args.fresh,
    )
    print(script if args.dry_run else submit(script), end="" if args.dry_run else "\n")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from megagpt import doctor, host_probe

    if args.probe:
        return host_probe.serve()
    if args.write_env:
        print(doctor.write_environment(args.hostfile), file=sys.stderr)
    found = doctor.examine(args.hostfile, args.run_file, args.overrides)
    print(json.dumps(found, default=vars) if args.json else doctor.as_text(found))
    return 2 if found["findings"] else 0


def _verify_resume(args: argparse.Namespace) -> int:
    from tempfile import TemporaryDirectory

    from megagpt.verify_resume import verify_resume

    if args.steps < 2:
        raise UserError(f"--steps {args.steps} cannot be cut in two; give 2 or more")
    then_ranks = args.then_ranks or args.ranks
    with TemporaryDirectory(prefix="verify_resume_") as folder:
        different, agreed = verify_resume(
            args.run_file,
            args.overrides,
            Path(folder),
            ranks=args.ranks,
            steps=args.steps,
            then_ranks=then_ranks,
            then=args.then,
        )
    how = f"{args.steps} steps straight and cut after {args.steps // 2}, on {args.ranks} rank(s)"
    how += "".join(f", then {change}" for change in [f"{then_ranks} rank(s)"] * (then_ranks != args.ranks) + args.then)
    print("\n".join([*different, f"{how}: " + ("NOT " if different else "") + agreed]))
    return 1 if different else 0


def _generate(args: argparse.Namespace) -> int:
    import torch
    from pydantic import ValidationError

    from megagpt.checkpoint import load_model
    from megagpt.config import SampleConfig
    from megagpt.generate import complete

    try:
        cfg = SampleConfig(
            prompts=tuple(args.prompt or [""]),
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
        )
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(f"--{str(wrong['loc'][0]).replace('_', '-')}={wrong['input']}: {wrong['msg']}") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, _ = load_model(args.checkpoint, device)
    for text in complete(model, tokenizer, cfg.prompts, cfg, batch=args.batch, seed=args.seed):
        print(text, end="\n---\n")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    import torch

    from megagpt.checkpoint import load_model, packing_of
    from megagpt.data import ValBlocks
    from megagpt.evaluate import evaluate, unigram_entropy
    from megagpt.shards import open_dataset

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = open_dataset(args.data)
    model, tokenizer, step_dir = load_model(args.checkpoint, device)
    if dataset.manifest.tokenizer.sha256 != tokenizer.sha256:
        raise UserError(
            f"{args.data} was tokenized with another model than {step_dir} was trained on; build it again with "
            f"tokenizer={step_dir / 'tokenizer.model'}"
        )
    document_end = tokenizer.eod_id if packing_of(step_dir).masked else None
    blocks = ValBlocks(dataset.stream(args.split), model.cfg.seq_len, args.tokens, document_end=document_end)
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(device)
    result = evaluate(model, blocks, token_bytes, micro_batch=args.micro_batch)
    row = {
        "checkpoint": str(step_dir),
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "unigram_entropy": unigram_entropy(blocks),
        "tokens": result.tokens,
    }
    if args.json:
        print(json.dumps(row))
    else:
        print(
            f"{step_dir} on {result.tokens:,} tokens of {args.data} ({args.split}):\n"
            f"  loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}, "
            f"{result.bits_per_byte:.4f} bits per byte\n"
            f"  guessing by token frequency alone would give {row['unigram_entropy']:.4f} nats per token"
        )
    return 0


COMMANDS = {
    "generate": _generate,
    "evaluate": _evaluate,
    "check-hosts": _check_hosts,
    "doctor": _doctor,
    "checkpoints": _checkpoints,
    "lint": _lint,
    "plan": _plan,
    "slurm": _slurm,
    "verify-resume": _verify_resume,
}


if __name__ == "__main__":
    sys.exit(main())
