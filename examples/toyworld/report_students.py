"""The part of `docs/results.md` on students of part (a): what goes with a better depth probe?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from recorded import Results, best_depth, best_probe, order, share, title
from report_endpoint import endpoint_of
from scipy.stats import rankdata
from significance import Correlation, permutation_p, rank_correlation

FEWEST_STUDENTS = 12
_TOWER = "depth R² (centred)"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Students:
    """Students of part (a), in one order within each tower, which permutations rely on."""

    rows: Sequence[Row]

    @property
    def towers(self) -> list[tuple[int, int]]:
        """Of each its tower."""
        return [(row["width"], row["tower_steps"]) for row in self.rows]

    @property
    def told(self) -> np.ndarray:
        """(N,): how many captions told distances."""
        return np.array([row["told"] for row in self.rows])

    def of(self, measure: Callable[[Row], float]) -> np.ndarray:
        """(N,): a figure of each."""
        return np.array([measure(row) for row in self.rows])

    def answers(self, place: str) -> np.ndarray:
        """(N,): share of right answers."""
        return self.of(lambda row: share(row["right"][place]))

    def alike(self, values: np.ndarray) -> np.ndarray:
        """Rank (N,) values among students that were told alike: what telling does to them is taken out."""
        found = np.zeros(len(values))
        for level in np.unique(self.told):
            own = self.told == level
            found[own] = (rankdata(values[own]) - (own.sum() + 1) / 2) / own.sum()
        return found


MEASURES: dict[str, Callable[[Row], float]] = {
    "probe of the depth teacher's features": best_probe,
    "depth read by a ridge": best_depth,
}


def verdict(results: Results) -> str:
    """Say what came out, for a reader who stops at the summary; nothing with too few students."""
    if len(results.students) < FEWEST_STUDENTS:
        return ""
    rows = sorted(results.students, key=lambda row: (row["width"], row["tower_steps"], row["told"]))
    return f"Part (a), {len(rows)} students of next tokens alone: {_verdict(Students(rows))}\n"


def representations(results: Results, plan: Mapping[str, Any]) -> str:
    """Write the section."""
    rows = sorted(results.students, key=lambda row: (row["width"], row["tower_steps"], row["told"]))
    lines = ["## (a) Better representations, better answers?", ""]
    if len(rows) < FEWEST_STUDENTS:
        said = f"Not enough was run yet: {len(rows)} students; correlations are told from {FEWEST_STUDENTS} on."
        return "\n".join([*lines, said, ""])
    students = Students(rows)
    spreads = ", ".join(
        f"{100 * float(values.mean(axis=1).std(ddof=1)):.1f} (`{arm}`, {len(seeds)} seeds)"
        for arm in ("none", "oracle")
        if len(seeds := results.seeds([arm], *endpoint_of(plan))) > 1
        for values in [results.values(arm, *endpoint_of(plan), seeds)]
    )
    lines += [
        f"{len(rows)} students of next tokens alone: towers of {_values(rows, 'width')} channels trained for {_values(rows, 'tower_steps')} steps, pretrained for equally many steps on the same pictures. "
        f"Of the 3000 captions {_values(rows, 'told')} tell distances, in the very words that questions of depth and distance need; what captions tell moves answers by itself, so **correlations are taken among students that are told alike** "
        "(ranks within each number of telling captions). What is read of depth, before fine-tuning, on pictures that pretraining did not have, best block: "
        + "; ".join(f"{name}, R² {students.of(m).min():.3f} to {students.of(m).max():.3f}" for name, m in MEASURES.items())
        + " (the mean map: 0)." + (f" One seed each; over seeds the answers to questions of depth of one recipe have an SD of {spreads} points." if spreads else ""),
        "", _verdict(students), "",
        *_among_alike(results, students), *_telling(students), *_specificity(students),
    ]  # fmt: skip
    return "\n".join(lines)


def _verdict(students: Students) -> str:
    """What came out for the probe that was fixed beforehand."""
    x, y = (students.alike(values) for values in (students.of(best_probe), students.answers("test depth")))
    found, p = rank_correlation(x, y, groups=students.towers), permutation_p(x, y, students.towers)
    told = f"ρ = {found.value:+.2f}, p = {_p(p)} by towers that change places"
    if p < 0.05 and found.value > 0:
        return f"**Among students that are told alike, those from which a depth probe reads more answer more questions of depth** ({told}). Towers that are better at depth are better at much else, so see the matrix."
    own = students.alike(students.of(lambda row: row["tower"][_TOWER]))
    tower, of_tower = rank_correlation(own, y, groups=students.towers), permutation_p(own, y, students.towers)
    without = ", ".join(
        f"{place.split()[1]} {rank_correlation(own, students.alike(students.answers(place))).value:+.2f}"
        for place in _places(students)
        if place in ("test colour", "test count", "test relation")
    )
    held = (
        f"How well a student's tower itself holds depth, which takes no probe of the student, does go with them (ρ = {tower.value:+.2f}, p = {_p(of_tower)}, uncorrected), "
        f"but with answers that need no depth too ({without}): a tower's quality at large, then, as far as this tells."
        if of_tower < 0.05 and tower.value > 0
        else f"Nor that how well its tower itself holds depth does (ρ = {tower.value:+.2f}, p = {_p(of_tower)})."
    )
    return (
        f"**It is not shown that, among students told alike, a better depth probe goes with more right answers on depth** ({told}; {len(set(students.towers))} towers tell large effects only). "
        f"{held}"
    )


def _among_alike(results: Results, students: Students) -> list[str]:
    loss = students.alike(students.of(lambda row: row["text"]))
    lines = [
        "| questions | chance | accuracy, lowest to highest | " + " | ".join(f"ρ with {name} | 95 % | p, by towers | given the next-token loss" for name in MEASURES) + " |",
        "|---|---|---|" + "---|---|---|---|" * len(MEASURES),
    ]  # fmt: skip
    for place in _places(students):
        shares = students.answers(place)
        cells = []
        for measure in MEASURES.values():
            x, y = students.alike(students.of(measure)), students.alike(shares)
            partial = rank_correlation(x, y, loss, groups=students.towers)
            cells += [
                _correlation(rank_correlation(x, y, groups=students.towers)),
                _p(permutation_p(x, y, students.towers)), _correlation(partial).split(" | ")[0],
            ]  # fmt: skip
        split, kind = place.split()
        head = f"{title((split, kind))} | {100 * results.chance[split, kind]:.0f} | {100 * shares.min():.1f} to {100 * shares.max():.1f}"
        lines.append(f"| {head} | {' | '.join(cells)} |")
    depth = students.alike(students.answers("test depth"))
    others = [place for place in _places(students) if place.startswith("test ") and place != "test depth"]
    apart = {
        name: ", ".join(
            f"{place.split()[1]} {rank_correlation(students.alike(students.of(m)), depth, minus=students.alike(students.answers(place))).value:+.2f}"
            for place in others
        )
        for name, m in MEASURES.items()
    }
    return [
        *lines, "",
        "A rank correlation of 0 is what no relation gives; –: too few students differ. The bootstrap draws towers, which several students share; "
        f"percentiles of draws of {len(set(students.towers))} towers are too narrow an interval, so trust the p-value more: how often the correlation is as far from 0 where the probes of whole towers change places. "
        "It is not corrected and describes, no more. The next-token loss is of columns in pictures held out, a turn by itself that no pretraining has: it stands for captioning in general.", "",
        "It was expected to go with depth more than with any other kind. Its correlation with depth minus that with each other kind: " + "; ".join(f"{name} – {one}" for name, one in apart.items())
        + ". Colour was named as the contrast only afterwards, and what lies far from it because the score goes *against* colour is no sign of depth.", "",
    ]  # fmt: skip


def _telling(students: Students) -> list[str]:
    """What captions tell, as a rival of the probes."""
    told, answers = students.told.astype(float), students.answers("test depth")
    lines = [
        "What captions tell as a rival, over all students:", "",
        "| | with depth answers | with how many captions tell | with depth answers, given how many tell | how many tell with depth answers, given it |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, measure in MEASURES.items():
        values = students.of(measure)
        cells = [
            rank_correlation(values, answers), rank_correlation(values, told),
            rank_correlation(values, answers, told), rank_correlation(told, answers, values),
        ]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(_correlation(one).split(" | ")[0] for one in cells) + " |")
    lines.append(f"| how many captions tell | {_correlation(rank_correlation(told, answers)).split(' | ')[0]} | | | |")
    changes = {"right answers on depth, points": 100 * answers}
    changes |= {f"{name}, R²": students.of(measure) for name, measure in MEASURES.items()}
    said = []
    for name, values in changes.items():
        apart = [
            float(values[most] - values[least])
            for tower in dict.fromkeys(students.towers)
            for least, most in [_ends(students, tower)]
            if least != most
        ]
        if apart:
            said.append(f"{name} {np.mean(apart):+.2f} (up in {sum(a > 0 for a in apart)} of {len(apart)} towers)")
    return [*lines, "", f"From the fewest to the most telling captions, tower by tower: {'; '.join(said)}.", ""]


def _ends(students: Students, tower: tuple[int, int]) -> tuple[int, int]:
    """Return the places of a tower's students with the fewest and with the most telling captions."""
    own = [place for place, one in enumerate(students.towers) if one == tower]
    return min(own, key=lambda place: students.told[place]), max(own, key=lambda place: students.told[place])


def _specificity(students: Students) -> list[str]:
    """The matrix of what is known about a student and what it is asked: is depth what goes with depth?"""
    about = {name: students.of(measure) for name, measure in MEASURES.items()}
    about |= {
        f"{name} of its tower": students.of(lambda row, name=name: row["tower"][name])  # type: ignore[misc]
        for name in students.rows[0]["tower"]
        if not name.endswith("by chance")
    }
    places = _places(students)
    lines = [
        "Spearman's correlation of each score with the answers to each kind of question, among students that are told alike; a tower's scores are the same for all of its students:", "",
        "| score | " + " | ".join(title((place.split()[0], place.split()[1])) for place in places) + " |",
        "|---|" + "---|" * len(places),
    ]  # fmt: skip
    asked = [students.alike(students.answers(place)) for place in places]
    for name, values in about.items():
        found = [_correlation(rank_correlation(students.alike(values), one)).split(" | ")[0] for one in asked]
        lines.append(f"| {name} | " + " | ".join(found) + " |")
    told = [rank_correlation(students.told.astype(float), students.answers(place)) for place in places]
    cells = " | ".join(_correlation(one).split(" | ")[0] for one in told)
    return [*lines, f"| how many captions tell (over all) | {cells} |", ""]


def _places(students: Students) -> list[str]:
    return sorted(students.rows[0]["right"], key=lambda name: order((name.split()[0], name.split()[1])))


def _correlation(found: Correlation) -> str:
    """A correlation and its interval, as two cells."""
    if math.isnan(found.value) or math.isnan(found.low):
        return "– | –"
    return f"{found.value:+.2f} | {found.low:+.2f} to {found.high:+.2f}"


def _p(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _values(rows: Sequence[Row], name: str) -> str:
    return ", ".join(str(value) for value in sorted({row[name] for row in rows}))
