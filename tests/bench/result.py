"""What one measurement has found: samples by side, and verdicts against targets."""

import statistics
from dataclasses import dataclass, field

import sampling


@dataclass
class Verdict:
    """A figure that has a target. `sign` is `<=`, `<` or `>=`."""

    what: str
    value: float
    sign: str
    target: float
    unit: str = ""

    def met(self):
        return {"<=": self.value <= self.target, "<": self.value < self.target, ">=": self.value >= self.target}[self.sign]

    def json(self):
        return {
            "what": self.what, "value": self.value, "target": f"{self.sign} {self.target:g}", "unit": self.unit,
            "met": self.met(),
        }


@dataclass
class Result:
    """One measurement: a title, the samples of each side, what they mean."""

    name: str
    title: str
    unit: str
    samples: dict = field(default_factory=dict)
    verdicts: list = field(default_factory=list)
    notes: list = field(default_factory=list)

    def median(self, side):
        return sampling.summary(self.samples[side])["median"]

    def more(self, side, other):
        """How much more a side is than the other, turn by turn; the median of that. What else the machine did fell on
        both samples of a turn."""
        return statistics.median(a - b for a, b in zip(self.samples[side], self.samples[other], strict=True))

    def require(self, what, value, sign, target, unit=""):
        self.verdicts.append(Verdict(what, value, sign, target, unit))

    @classmethod
    def of_json(cls, found):
        """The measurement that `json` wrote down, elsewhere."""
        samples = {side: of["samples"] for side, of in found["sides"].items()}
        result = cls(found["name"], found["title"], found["unit"], samples, notes=found["notes"])
        for verdict in found["verdicts"]:
            sign, target = verdict["target"].split()
            result.require(verdict["what"], verdict["value"], sign, float(target), verdict["unit"])
        return result

    def json(self):
        return {
            "name": self.name, "title": self.title, "unit": self.unit,
            "sides": {
                side: {**sampling.summary(samples), "samples": samples} for side, samples in self.samples.items()
            },
            "verdicts": [verdict.json() for verdict in self.verdicts],
            "notes": self.notes,
        }
