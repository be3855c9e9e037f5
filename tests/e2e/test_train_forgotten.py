"""Training after `olapipe forget`: the image is masked, and every other sample stays where it was."""

from __future__ import annotations

from pathlib import Path

from pipeline_support import olapipe
from trainer_support import make_corpus, make_student

from olaschema.store import FeatureStore
from olatrain.compose import load_processor
from olatrain.conversations import Conversations
from olatrain.families import open_vision
from olatrain.join import coverage, join
from olatrain.prompts import PromptBuilder
from olatrain.storedata import StoreData
from olatrain.stream import Sample, SampleStream, Source
from olatrain.tokens import TaskTokens


def test_a_forgotten_image_is_masked_and_the_order_stays(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    student = make_student(tmp_path / "student")
    conversations = Conversations.read(corpus.conversations)
    before = join(conversations, FeatureStore.open(corpus.store))
    key = corpus.keys[2]
    assert olapipe("forget", corpus.store, key, "--yes").exit_code == 0
    store = FeatureStore.open(corpus.store)
    after = join(conversations, store)
    assert after.digest == before.digest, "a run that has begun goes on"
    found = coverage(store, after, "depth")
    assert found.missing == {"forgotten": 2}, "the image is used twice"
    processor = load_processor(student)
    source = Source(
        data=StoreData.at(str(corpus.store), ("depth", "gen"), corpus.conversations, corpus.images),
        teachers=("depth", "gen"),
        prompts=PromptBuilder(processor.tokenizer, TaskTokens.load(student), max_length=512),
        vision=open_vision(processor, TaskTokens.load(student)),
        exif=True,
        max_pixels=10**6,
    )
    stream = SampleStream(source, after, seed=None)
    masked = 0
    for position in range(len(after)):
        sample = stream[position]
        assert isinstance(sample, Sample)
        if not sample.keys:
            continue
        missing = [feature is None for feature in sample.features[0].values()]
        assert missing == [sample.keys == (key,)] * 2
        masked += all(missing)
    assert masked == 2
