"""What is computed: selections, tunings and measurements, each remembered by content so that a run can go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amoeba_deploy.evaluation import Ids, LogitsFunction, text_loss, text_rows
from amoeba_deploy.evaluation_cache import remembered
from amoeba_deploy.model_folder import ModelFolder
from amoeba_deploy.plan import Steps
from amoeba_deploy.selection import Selection
from amoeba_deploy.shape import Shape
from amoeba_deploy.stage2.batches import Batches, tokenise
from amoeba_deploy.stage2.elastic import ElasticModel
from amoeba_deploy.stage2.instructions import read_examples
from amoeba_deploy.stage2.pipeline import make_trainer
from amoeba_deploy.stage2.processes import Processes
from amoeba_deploy.stage2.selected import Selected
from amoeba_deploy.stage2.settings import Settings
from benchmarks.paper.data import Data, measure
from benchmarks.paper.methods import Method, kept_share, reachable, select, shapes_at, tuning_settings

Cell = dict[str, Any]
"""One method at one ratio with one seed: shape, share kept, losses row by row, answers by task."""


@dataclass
class Runs:
    """Everything that a table asks for, of one model."""

    model: ModelFolder
    data: Data
    settings: Settings
    samples: int
    sequence: int
    folder: Path
    say: Callable[[str], None]
    cpu: bool = True
    _selections: dict[tuple[str, int], Selection] = field(default_factory=dict)

    @property
    def steps(self) -> Steps:
        """The numbers of units that subnets keep: neurons in the multiples that engines take."""
        return Steps.of(self.model.architecture)

    def selection(self, method: Method, seed: int) -> Selection:
        """What a method selects on a seed's calibration text; methods that select alike share it."""
        key = f"{method.depth} {method.width}", seed
        if key not in self._selections:
            text = str(self.data.of_seed(seed).calibration)
            self._selections[key] = select(self.model, method, text, self.samples, self.sequence)
        return self._selections[key]

    def cells(self, method: Method, ratios: tuple[float, ...], seed: int) -> dict[float, Cell]:
        """A method at some ratios; what was computed before is looked up."""
        facts = {
            "model": self.model.digest,
            "method": repr(method),
            "ratios": list(ratios),
            "seed": seed,
            "settings": self.settings.to_json(),
            "calibration": [self.samples, self.sequence],
            "data": self.data.facts(seed),
            "torch": torch.__version__,
        }

        def compute() -> dict[str, Any]:
            self.say(f"seed {seed}: {method.name}")
            return {str(ratio): cell for ratio, cell in self._computed(method, ratios, seed).items()}

        found, _ = remembered(facts, compute, folder=self.folder)
        return {ratio: found[str(ratio)] for ratio in ratios}

    def _computed(self, method: Method, ratios: tuple[float, ...], seed: int) -> dict[float, Cell]:
        selection, sizes = self.selection(method, seed), self.model.architecture
        if method.once:
            elastic = self._tuned(method, selection, None, seed)
            return {ratio: self._best(elastic, method, selection, ratio, seed) for ratio in ratios}
        found = {}
        for ratio in ratios:
            if method.depth == "dp":
                # The shape that was chosen for Amoeba at this ratio and seed, tuned by itself.
                chosen = self.cells(_once(method), ratios, seed)[ratio]["shape"]
                shape = Shape.parse(chosen, method.policy)
            else:
                possible = shapes_at(selection, sizes, method, reachable(ratio, sizes.depth), self.steps)
                if not possible:
                    raise SystemExit(f"{method.name} reaches no shape within 1% of {ratio:.0%} of the parameters")
                shape = possible[0]
            elastic = self._tuned(method, selection, shape, seed)
            found[ratio] = self._cell(elastic, selection, shape)
        return found

    def _tuned(self, method: Method, selection: Selection, shape: Shape | None, seed: int) -> ElasticModel:
        settings = replace(tuning_settings(self.settings, method, shape), seed=seed)
        model, sizes = self.model, self.model.architecture
        rows = tokenise(
            read_examples(self.data.of_seed(seed).tuning),
            model.tokenizer(),
            bos=None,
            eos=None,
            context=sizes.context,
            source=min(192, sizes.context - 64),
            target=64,
        )
        batches = Batches(rows, settings.batch, seed, "none")
        processes = Processes(settings.mixed_precision, cpu=self.cpu)
        trainer = make_trainer(Selected(str(model.path), model, selection), batches, settings, processes)
        trainer.elastic.steps = self.steps
        for _ in trainer.run(settings.steps):
            pass
        return trainer.elastic.eval()

    def _best(self, elastic: ElasticModel, method: Method, selection: Selection, ratio: float, seed: int) -> Cell:
        """The shape with the lowest loss on calibration text among those with as many parameters."""
        sizes = self.model.architecture
        lowest = min(self.settings.widths)
        target = reachable(ratio, sizes.depth)
        possible = [one for one in shapes_at(selection, sizes, method, target, self.steps) if one.width >= lowest]
        text = self.data.of_seed(seed).calibration
        rows = text_rows(text, self.model.tokenizer(), self.sequence)[: self.samples]
        losses = []
        for shape in possible:
            with elastic.shape(shape):
                losses.append(text_loss(logits_of(elastic), rows).loss)
        best = possible[int(np.argmin(losses))]
        considered = {str(one): round(loss, 5) for one, loss in zip(possible, losses, strict=True)}
        return self._cell(elastic, selection, best) | {"considered": considered}

    def _cell(self, elastic: ElasticModel, selection: Selection, shape: Shape) -> Cell:
        share = kept_share(selection, self.model.architecture, shape, self.steps)
        with elastic.shape(shape):
            return {"shape": str(shape), "share": share, **measure(logits_of(elastic), self.model, self.data)}


def _once(method: Method) -> Method:
    """The method that is tuned once for all ratios and selects as another one does."""
    from benchmarks.paper.methods import METHODS

    return next(one for one in METHODS if one.once and (one.depth, one.width) == (method.depth, method.width))


def logits_of(elastic: ElasticModel) -> LogitsFunction:
    """Logits of the shape that is running."""

    def logits(ids: Ids) -> Any:
        with torch.no_grad():
            return elastic(torch.from_numpy(ids).to(elastic.device)).float().cpu().numpy()

    return logits
