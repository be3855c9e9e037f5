"""The toy world's truth: what is drawn is what the scene says."""

from __future__ import annotations

import numpy as np
import pytest
from toyworld import scenes


def test_a_scene_is_a_function_of_split_and_number() -> None:
    first, again = scenes.make_scene("train", 7), scenes.make_scene("train", 7)
    assert first == again
    assert (scenes.render(first).rgb == scenes.render(again).rgb).all()
    assert scenes.make_scene("test", 7) != first


@pytest.mark.parametrize("split", ["train", "test", "ood", "haze", "haze-test", "contact-test"])
def test_depth_and_segments_are_those_of_the_things(split: scenes.Split) -> None:
    for index in range(40):
        scene = scenes.make_scene(split, index)
        picture = scenes.render(scene)
        assert picture.rgb.shape == (scene.height, scene.width, 3)
        assert ("size" in scene.cues) == (split in ("train", "test"))
        assert list(scene.things) == sorted(scene.things, key=lambda thing: -thing.distance)
        for number, thing in enumerate(scene.things):
            seen = picture.segments == 2 + number
            assert (picture.distance[seen] == np.float32(thing.distance)).all()
        nearest = picture.segments == 1 + len(scene.things)  # nothing covers the nearest thing
        assert nearest.any()
        assert np.isinf(picture.distance[picture.segments == 0]).all()
        assert len({thing.name for thing in scene.things}) == len(scene.things)


def test_a_cue_tells_the_distance_and_its_absence_does_not() -> None:
    things = {True: [], False: []}
    for index in range(300):
        scene = scenes.make_scene("train", index)
        things["contact" in scene.cues] += [(1 / thing.distance, thing.foot) for thing in scene.things]
    correlations = {cue: np.corrcoef(np.array(found).T)[0, 1] for cue, found in things.items()}
    assert correlations[True] > 0.999
    assert abs(correlations[False]) < 0.15


def test_pictures_of_one_cue_tell_distances_by_that_alone() -> None:
    for split, cue in (("haze", "haze"), ("haze-test", "haze"), ("contact-test", "contact")):
        made = [scenes.make_scene(split, index) for index in range(300)]
        assert {scene.cues for scene in made} == {frozenset({cue})}
        things = [(1 / thing.distance, thing.foot, thing.size) for scene in made for thing in scene.things]
        near, foot, size = np.array(things).T
        assert (abs(np.corrcoef(near, foot)[0, 1]) > 0.999) == (cue == "contact")
        assert cue == "contact" or abs(np.corrcoef(near, foot)[0, 1]) < 0.15
        assert abs(np.corrcoef(near, size)[0, 1]) < 0.15
