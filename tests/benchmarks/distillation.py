"""Is distilling with Driftline as fast as with TextBrewer, and what do label store and buckets add?

    python tests/benchmarks/distillation.py [--peers DIR] [--peer-python PATH] [--build-peer]
    python tests/benchmarks/distillation.py --quick

The baseline is TextBrewer 0.2.1.post1 in an environment of its own: ``--build-peer`` makes one that
borrows this one's torch and transformers, so that both run the same kernels. Without one only our
side is timed.

*equal*: everything as in ``peers/textbrewer_bench.py`` (papers.md 3.4): its models, batches and
losses (T = 8, hidden_mse and nst at four layers), 12 layers to 3. Without dropout the first and the
last loss must agree to 1e-4. The bar is a ratio of 1; as the arithmetic is the same, little more is
to be had. ``fused`` is our trainer's own optimiser, the same AdamW in one kernel; ``plain`` takes
torch's default on both sides.

*ragged*: inputs of 8 to 64 tokens and a teacher that was trained on them. Ours asks the teacher
once, stores logits and matched states by row, and puts rows of similar length into a batch.
TextBrewer pads each batch of random rows to its longest and asks the teacher in every step, as it
must where layers are matched (``mse``, papers.md B18); with soft labels alone (``labels``) it may
cache them, in frozen batches. Ratios count the teacher's pass and the filling of the cache. The bar
is 2, with students of equal quality: loss against the teacher and accuracy on held-out rows, over
seeds.

Both sides run one thread, interleaved, each in a process of its own. Figures are medians; CPU time
is the steadier of the two on a shared machine. A step is one batch: forward, loss, backward, AdamW.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
TEXTBREWER: Final = ("textbrewer==0.2.1.post1", "tensorboard")
TOLERANCE: Final = 1e-4
PIECES: Final = 200  # different tokens in the ragged rows, so that a few hundred rows teach them
SHORTEST, LONGEST = 8, 64
FIRST_PIECE: Final = 5


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    hidden: int = 256
    teacher_layers: int = 12
    student_layers: int = 3
    vocabulary: int = 32_000
    batch: int = 32
    steps: int = 20
    """Timed steps of a run on equal terms."""
    rows: int = 640
    held_out: int = 640
    epochs: int = 4
    teacher_steps: int = 400
    teacher_rate: float = 2e-4
    student_rate: float = 5e-4
    repeats: int = 5


QUICK: Final = Sizes(
    hidden=64,
    teacher_layers=4,
    student_layers=2,
    vocabulary=2_000,
    batch=16,
    steps=6,
    rows=320,
    held_out=320,
    epochs=3,
    teacher_steps=150,
    teacher_rate=1e-3,
    student_rate=2e-3,
    repeats=2,
)


# --- children: one run each, in a process of its own --------------------------------------


def peer_arguments(sizes: Sizes, *, dropout: float) -> list[str]:
    return [
        *("--hidden", str(sizes.hidden), "--vocab", str(sizes.vocabulary)),
        *("--teacher-layers", str(sizes.teacher_layers)),
        *("--student-layers", str(sizes.student_layers)),
        *("--batch", str(sizes.batch), "--steps", str(sizes.steps), "--dropout", str(dropout)),
    ]


def equal_ours(sizes: Sizes, *, peers: str, dropout: float, fused: bool) -> dict[str, Any]:
    """The bare benchmark of the peer, by our distiller."""
    sys.path.insert(0, peers)
    import textbrewer_bench as peer  # type: ignore[import-not-found]
    import torch

    from driftline.platform.distillation.distiller import Distiller
    from driftline.platform.settings import ObjectiveSettings

    arguments = peer.get_args(peer_arguments(sizes, dropout=dropout))
    torch.set_num_threads(1)
    teacher, student = peer.models(arguments)
    data = peer.batches(arguments)
    torch.manual_seed(arguments.seed + 2)
    objective = ObjectiveSettings.model_validate(
        {
            "preset": "textbrewer",
            "matches": [{"kind": "hidden_mse"}, {"kind": "nst", "compat": True}],
        }
    )
    distiller = Distiller(student.train(), objective, teacher=teacher)
    optimizer = torch.optim.AdamW(distiller.parameter_groups(), lr=arguments.lr, fused=fused)
    stamps, losses = [], []
    for batch in data:
        stamps.append((time.perf_counter(), time.process_time()))
        total = distiller(batch).total
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.detach())
    steps = list(itertools.pairwise(stamps))[arguments.warmup :]
    wall = [after[0] - before[0] for before, after in steps]
    cpu = [after[1] - before[1] for before, after in steps]
    return {
        "steps_per_s_median": 1 / statistics.median(wall),
        "cpu_s_per_step": statistics.median(cpu),
        "loss_first": losses[0].item(),
        "loss_last": losses[-1].item(),
    }


def ragged_rows(number: int, *, seed: int) -> tuple[list[Any], Any]:
    """Token lists, and labels that say whether pieces of one half outweigh those of the other."""
    import numpy as np

    random = np.random.default_rng(seed)
    lengths = random.integers(SHORTEST, LONGEST + 1, number)
    tilts = random.choice([0.35, 0.65], number)
    rows, labels = [], []
    for length, tilt in zip(lengths, tilts, strict=True):
        upper = random.random(length) < tilt
        pieces = random.integers(0, PIECES // 2, length) + upper * (PIECES // 2)
        rows.append((FIRST_PIECE + pieces).astype(np.int64))
        labels.append(int(upper.mean() > 0.5))
    return rows, np.array(labels)


def padded(rows: Sequence[Any]) -> dict[str, Any]:
    """A batch as long as its longest row."""
    import torch

    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.from_numpy(row)
    mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def ragged_model(sizes: Sizes, layers: int, *, seed: int) -> Any:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, sizes.hidden // 64),
        intermediate_size=4 * sizes.hidden,
        max_position_embeddings=128,
        output_hidden_states=True,
    )
    return BertForSequenceClassification(config)


def ragged_teacher(sizes: Sizes, *, weights: str) -> dict[str, Any]:
    """Train the teacher on rows of its own, and keep it."""
    import torch
    from safetensors.torch import save_file
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(1)
    model = ragged_model(sizes, sizes.teacher_layers, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.teacher_rate, fused=True)
    warmup = max(1, sizes.teacher_steps // 5)
    rows, labels = ragged_rows(sizes.teacher_steps * sizes.batch, seed=1)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    steps = [order[at : at + sizes.batch] for at in range(0, len(order), sizes.batch)]
    shuffled = torch.randperm(len(steps), generator=torch.Generator().manual_seed(2)).tolist()
    for number, place in enumerate(shuffled):
        for group in optimizer.param_groups:
            group["lr"] = sizes.teacher_rate * min(1.0, (number + 1) / warmup)
        chosen = steps[place]
        logits = model(**padded([rows[row] for row in chosen])).logits
        loss = cross_entropy(logits, torch.from_numpy(labels[chosen]))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    save_file(model.state_dict(), weights)
    return quality(model.eval(), model, sizes)


def quality(student: Any, teacher: Any, sizes: Sizes) -> dict[str, Any]:
    """Distance to the teacher at T = 8, as in training, and accuracy, on held-out rows."""
    import torch
    from torch.nn.functional import kl_div, log_softmax

    rows, labels = ragged_rows(sizes.held_out, seed=3)
    loss, hits, agreed = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, len(rows), 64):
            batch, true = padded(rows[start : start + 64]), labels[start : start + 64]
            own, other = (model.eval()(**batch).logits for model in (student, teacher))
            soft = [log_softmax(logits / 8, -1) for logits in (own, other)]
            loss += kl_div(soft[0], soft[1], reduction="sum", log_target=True).item()
            hits += int((own.argmax(-1).numpy() == true).sum())
            agreed += int((own.argmax(-1) == other.argmax(-1)).sum())
    number = len(rows)
    return {
        "soft_loss": 64 * loss / number,
        "accuracy": hits / number,
        "agreement": agreed / number,
    }


def decay(sizes: Sizes) -> dict[str, Any]:
    """A rate that falls in a line: else the last batches decide how good a student is."""
    steps = sizes.epochs * math.ceil(sizes.rows / sizes.batch)
    return {"lr_lambda": lambda step: 1 - step / steps}


def load_teacher(sizes: Sizes, weights: str) -> Any:
    from safetensors.torch import load_file

    model = ragged_model(sizes, sizes.teacher_layers, seed=0)
    model.load_state_dict(load_file(weights))
    return model.eval()


def ragged_ours(sizes: Sizes, *, weights: str, match: str, seed: int) -> dict[str, Any]:
    """One pass of the teacher into a store, then batches of similar length."""
    import numpy as np
    import torch

    from driftline.platform.batching import BatchPlan
    from driftline.platform.distillation.anatomy import shape_of
    from driftline.platform.distillation.capture import Capture
    from driftline.platform.distillation.distiller import Distiller, TeacherTensors, hugging_face
    from driftline.platform.settings import ObjectiveSettings
    from driftline.platform.teacher_features import FeatureShape, TeacherFeatures

    torch.set_num_threads(1)
    teacher = load_teacher(sizes, weights)
    student = ragged_model(sizes, sizes.student_layers, seed=100 + seed).train()
    rows, _ = ragged_rows(sizes.rows, seed=10 + seed)
    lengths = np.array([len(row) for row in rows])
    matches = ["hidden_mse"] if match == "mse" else []
    objective = ObjectiveSettings.model_validate({"preset": "textbrewer", "matches": matches})
    distiller = Distiller(student, objective, teacher_shape=shape_of(teacher))
    optimizer = torch.optim.AdamW(distiller.parameter_groups(), lr=sizes.student_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, **decay(sizes))
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder, timed() as spent:
        keys = distiller.teacher_keys
        store, logits = None, torch.empty(len(rows), 2)
        if keys:
            shapes = {key: FeatureShape(("T", sizes.hidden)) for key in keys}
            store = TeacherFeatures.create(Path(folder) / "store", teacher="teacher", shapes=shapes)
        order = np.argsort(lengths, kind="stable")
        segment: Any = contextlib.nullcontext()
        if store is not None:
            segment = store.segment(np.arange(len(rows)), lengths)
        with segment as writer, torch.inference_mode():
            for start in range(0, len(rows), 64):
                chosen = order[start : start + 64]
                with Capture(teacher, keys) as seen:
                    told = hugging_face(teacher, padded([rows[row] for row in chosen])).logits
                logits[chosen] = told
                if writer is not None:
                    found = {key: tensor.numpy() for key, tensor in seen.features.items()}
                    writer.write(chosen, told.numpy(), found)
        pass_seconds = spent.so_far()
        plan = BatchPlan(len(rows), sizes.batch, sizes.epochs, seed=seed, lengths=lengths)
        for step in range(plan.num_steps):
            chosen = plan.rows(step)
            batch = padded([rows[row] for row in chosen])
            width = batch["input_ids"].shape[1]
            features = {}
            if store is not None:
                features = {key: store.read(key, chosen, num_tokens=width) for key in keys}
            losses = distiller(batch, stored=TeacherTensors(logits[chosen], features))
            losses.total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return spent.figures(sizes, pass_seconds) | quality(student, teacher, sizes)


def ragged_textbrewer(sizes: Sizes, *, weights: str, match: str, seed: int) -> dict[str, Any]:
    """TextBrewer as its users run it: shuffled rows, padded to the longest of the batch."""
    os.environ["TQDM_DISABLE"] = "1"
    import textbrewer  # type: ignore[import-not-found]
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    teacher = load_teacher(sizes, weights)
    student = ragged_model(sizes, sizes.student_layers, seed=100 + seed)
    rows, _ = ragged_rows(sizes.rows, seed=10 + seed)
    step = sizes.teacher_layers // sizes.student_layers
    matched = [
        {"layer_T": layer * step, "layer_S": layer, "feature": "hidden", "loss": "hidden_mse",
         "weight": 1}
        for layer in range(sizes.student_layers + 1)
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(student.parameters(), lr=sizes.student_rate)
    torch.manual_seed(seed)

    def adaptor(batch: Any, output: Any) -> dict[str, Any]:
        found = {"logits": output.logits, "inputs_mask": batch["attention_mask"]}
        return found | ({"hidden": output.hidden_states} if match == "mse" else {})

    with tempfile.TemporaryDirectory() as folder, timed() as spent:
        training = textbrewer.TrainingConfig(
            device="cpu", output_dir=folder, ckpt_epoch_frequency=sizes.epochs
        )
        distillation = textbrewer.DistillationConfig(
            temperature=8,
            intermediate_matches=matched if match == "mse" else None,
            is_caching_logits=match == "labels",
        )
        kind = textbrewer.GeneralDistiller if match == "mse" else textbrewer.BasicDistiller
        distiller = kind(training, distillation, teacher, student, adaptor, adaptor)
        loader: Any = DataLoader(rows, sizes.batch, shuffle=True, collate_fn=padded)  # type: ignore[arg-type]
        with distiller:
            distiller.train(
                optimizer,
                loader,
                num_epochs=sizes.epochs,
                scheduler_class=torch.optim.lr_scheduler.LambdaLR,
                scheduler_args=decay(sizes),
                callback=None,
            )
    return spent.figures(sizes, 0.0) | quality(student, teacher, sizes)


class Spent:
    """Wall and processor time of a block."""

    def __init__(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def so_far(self) -> float:
        return time.perf_counter() - self.started[0]

    def stop(self) -> None:
        self.wall = self.so_far()
        self.cpu = time.process_time() - self.started[1]

    def figures(self, sizes: Sizes, pass_seconds: float) -> dict[str, float]:
        steps = sizes.epochs * math.ceil(sizes.rows / sizes.batch)
        return {
            "steps_per_s": steps / self.wall,
            "steps_per_s_training": steps / (self.wall - pass_seconds),
            "cpu_s_per_step": self.cpu / steps,
            "pass_seconds": pass_seconds,
        }


@contextlib.contextmanager
def timed() -> Iterator[Spent]:
    spent = Spent()
    yield spent
    spent.stop()


CHILDREN: Final = {
    child.__name__: child for child in (equal_ours, ragged_teacher, ragged_ours, ragged_textbrewer)
}


# --- the parent: who runs when ------------------------------------------------------------


class Bench:
    """Runs children, ours and the peer's in turn."""

    def __init__(self, sizes: Sizes, *, peers: Path, peer_python: Path | None) -> None:
        self.sizes = sizes
        self.peers = peers
        self.peer_python = peer_python

    def child(self, name: str, *, peer: bool = False, **values: Any) -> dict[str, Any]:
        raw = json.dumps({"sizes": asdict(self.sizes), "values": values})
        python = self.peer_python if peer else Path(sys.executable)
        return self._run([str(python), "-W", "ignore", __file__, "--child", name, raw])

    def textbrewer_equal(self, *, dropout: float) -> dict[str, Any]:
        arguments = peer_arguments(self.sizes, dropout=dropout)
        script = self.peers / "textbrewer_bench.py"
        return self._run([str(self.peer_python), "-W", "ignore", str(script), *arguments])

    def _run(self, command: Sequence[str]) -> dict[str, Any]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command[:5])} failed:\n{done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found

    def equal(self) -> dict[str, float]:
        peers = str(self.peers)
        print("equal terms: the same models, batches and losses")
        figures: dict[str, float] = {}
        if self.peer_python is not None:
            theirs = self.textbrewer_equal(dropout=0)
            own = self.child("equal_ours", peers=peers, dropout=0, fused=True)
            gap = max(abs(own[name] - theirs[name]) for name in ("loss_first", "loss_last"))
            verdict = "equal" if gap <= TOLERANCE else "NOT EQUAL"
            print(
                f"    losses without dropout: {own['loss_first']:.5f} -> {own['loss_last']:.5f}, "
                f"{theirs['loss_first']:.5f} -> {theirs['loss_last']:.5f}: {verdict} ({gap:.1e})"
            )
            figures["loss_gap_equal"] = gap
        runs: dict[str, list[dict[str, Any]]] = {"fused": [], "plain": [], "textbrewer": []}
        for number in range(self.sizes.repeats):
            names = list(runs)[number % 3 :] + list(runs)[: number % 3]
            for name in names:
                if name != "textbrewer":
                    fused = name == "fused"
                    own = self.child("equal_ours", peers=peers, dropout=0.1, fused=fused)
                    runs[name].append(own)
                elif self.peer_python is not None:
                    runs[name].append(self.textbrewer_equal(dropout=0.1))
        for name, found in runs.items():
            report(name, found, "steps_per_s_median")
            if found:
                figures[f"steps_per_s_equal_{name}"] = middle(found, "steps_per_s_median")
                figures[f"cpu_s_per_step_equal_{name}"] = middle(found, "cpu_s_per_step")
        if runs["textbrewer"]:
            for name, key in (("equal", "fused"), ("equal_plain_optimizer", "plain")):
                figures |= ratios(name, runs[key], runs["textbrewer"], "steps_per_s_median")
        return figures

    def ragged(self, folder: Path) -> dict[str, float]:
        weights = str(folder / "teacher.safetensors")
        taught = self.child("ragged_teacher", weights=weights)
        print(f"ragged inputs, {SHORTEST} to {LONGEST} tokens; the teacher's accuracy is "
              f"{taught['accuracy']:.3f}")  # fmt: skip
        figures = {"accuracy_ragged_teacher": taught["accuracy"]}
        for match in ("mse", "labels"):
            runs: dict[str, list[dict[str, Any]]] = {"ours": [], "textbrewer": []}
            for seed in range(self.sizes.repeats):
                sides = ["ours", "textbrewer"] if seed % 2 else ["textbrewer", "ours"]
                for side in sides:
                    is_peer = side == "textbrewer"
                    if is_peer and self.peer_python is None:
                        continue
                    values = {"weights": weights, "match": match, "seed": seed}
                    runs[side].append(self.child(f"ragged_{side}", peer=is_peer, **values))
            print(f"  {'hidden_mse at four layers' if match == 'mse' else 'soft labels alone'}")
            for side, found in runs.items():
                report(side, found, "steps_per_s")
                for name in ("soft_loss", "accuracy", "agreement"):
                    if found:
                        figures[f"{name}_ragged_{match}_{side}"] = middle(found, name)
            if runs["textbrewer"]:
                cached = "cached" if match == "mse" else "labels_cached"
                figures |= ratios(
                    f"ragged_{cached}", runs["ours"], runs["textbrewer"], "steps_per_s"
                )
                for name in ("soft_loss", "accuracy"):
                    figures |= difference(f"{name}_ragged_{match}", name, runs)
        return figures


def middle(runs: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def report(name: str, runs: Sequence[dict[str, Any]], rate: str) -> None:
    if not runs:
        print(f"    {name:11} not measured: no peer environment (--build-peer)")
        return
    rates, cpu = [run[rate] for run in runs], [run["cpu_s_per_step"] for run in runs]
    quality = ""
    if "accuracy" in runs[0]:
        quality = (
            f"; held-out soft loss {middle(runs, 'soft_loss'):.4f}, accuracy "
            f"{middle(runs, 'accuracy'):.3f}, training alone "
            f"{middle(runs, 'steps_per_s_training'):.2f} steps/s"
        )
    print(
        f"    {name:11}{statistics.median(rates):8.3f} steps/s ({min(rates):.3f} .. "
        f"{max(rates):.3f}){statistics.median(cpu):9.4f} CPU-s/step ({min(cpu):.4f} .. "
        f"{max(cpu):.4f}){quality}"
    )


def ratios(
    name: str, ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], rate: str
) -> dict[str, float]:
    """Ours over theirs, run by run: the median is quoted, the range printed."""
    pairs = list(zip(ours, theirs, strict=True))
    wall = [own[rate] / other[rate] for own, other in pairs]
    cpu = [other["cpu_s_per_step"] / own["cpu_s_per_step"] for own, other in pairs]
    print(
        f"    ratio {name}: {statistics.median(wall):.3f} ({min(wall):.3f} .. {max(wall):.3f}) by "
        f"wall, {statistics.median(cpu):.3f} ({min(cpu):.3f} .. {max(cpu):.3f}) by CPU time"
    )
    return {
        f"ratio_to_textbrewer_{name}": statistics.median(wall),
        f"ratio_to_textbrewer_{name}_cpu": statistics.median(cpu),
    }


def difference(name: str, key: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Ours less theirs over the seeds, with twice the standard error."""
    gaps = [
        own[key] - other[key] for own, other in zip(runs["ours"], runs["textbrewer"], strict=True)
    ]
    mean = statistics.fmean(gaps)
    error = 2 * statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    print(f"    {key} ours less theirs: {mean:+.4f} +- {error:.4f} over {len(gaps)} seeds")
    return {f"{name}_gap": mean, f"{name}_gap_error": error}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        raw = json.loads(sys.argv[3])
        print(json.dumps(CHILDREN[sys.argv[2]](Sizes(**raw["sizes"]), **raw["values"])))
        return
    sys.path.append(str(ROOT))  # not for the children: their Python may have nothing of ours
    from tests.benchmarks.rig.environments import borrowing_environment
    from tests.benchmarks.rig.report import about, print_figures

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models, about a minute")
    parser.add_argument("--repeats", type=int, help="runs of each side, and seeds (default 5)")
    parser.add_argument("--part", choices=("equal", "ragged", "both"), default="both")
    parser.add_argument("--peers", type=Path, default=ROOT.parent / "shared" / "peers",
                        help="folder of textbrewer_bench.py")  # fmt: skip
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has TextBrewer")
    parser.add_argument("--build-peer", action="store_true", help="make one where there is none")
    parser.add_argument("--peer-folder", type=Path, default=ROOT / ".venv" / "textbrewer",
                        help="where --build-peer makes it, and where it is looked for")  # fmt: skip
    arguments = parser.parse_args()
    origin, sizes = about(), QUICK if arguments.quick else Sizes()
    if arguments.repeats is not None:
        sizes = Sizes(**(asdict(sizes) | {"repeats": arguments.repeats}))
    python = arguments.peer_python
    if python is None and arguments.build_peer:
        python = borrowing_environment(arguments.peer_folder, TEXTBREWER)
    if python is None and (arguments.peer_folder / "bin" / "python").exists():
        python = arguments.peer_folder / "bin" / "python"
    bench = Bench(sizes, peers=arguments.peers.resolve(), peer_python=python)
    figures: dict[str, float] = {}
    if arguments.part in ("equal", "both"):
        if (bench.peers / "textbrewer_bench.py").exists():
            figures |= bench.equal()
        else:
            print(f"equal terms: skipped, {bench.peers} has no textbrewer_bench.py (--peers)")
    if arguments.part in ("ragged", "both"):
        with tempfile.TemporaryDirectory(prefix="driftline-benchmark-") as folder:
            figures |= bench.ragged(Path(folder))
    name = "distillation_quick" if arguments.quick else "distillation"
    print_figures(name, figures, origin=origin)


if __name__ == "__main__":
    main()
