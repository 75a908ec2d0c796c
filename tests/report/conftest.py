"""Deployments with known figures, and a parser that holds what a page says."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from leannorm.records import (
    Change,
    Deployment,
    Environment,
    Epoch,
    Recalibration,
    Refusal,
    ShippedFile,
    TrainingRun,
    TransformReport,
    Verification,
)

VOID = {"meta", "br", "link", "img", "input", "hr"}


class ParsedPage(HTMLParser):
    """Tags, attributes and text of a page; raises where a tag is closed that is not open."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.structure: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.structure.append((tag, tuple(sorted(name for name, _ in attrs))))
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert "svg" in self.open, f"<{tag}/> is not closed in HTML"
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        return " ".join(" ".join(text.split()) for tag, text in self.texts if tag != "style")

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]


@pytest.fixture(name="parse", scope="session")
def parse_fixture() -> type[ParsedPage]:
    return ParsedPage


@pytest.fixture
def deployment() -> Deployment:
    return Deployment(
        checkpoint="runs/full/best.ckpt",
        training=TrainingRun(
            model="resnet8",
            data="digits",
            statistics="full",
            seed=7,
            epochs=2,
            batch_size=48,
            learning_rate=0.125,
            classes=("zero", "one"),
            input_shape=(3, 33, 35),
            history=(
                Epoch(1, 2.345, 1.876, 0.4321, 0.125, 3.21),
                Epoch(2, 0.567, 0.789, 0.9753, 0.0625, 3.33),
            ),
            environment=Environment("Linux machine", 2, "3.11.7", (("torch", "2.13.0"),), "abc1234"),
        ),
        recalibration=Recalibration("recalibrated", 0.9753, 0.9781, 17),
        fold=TransformReport(
            (Change("layer1.bn1", "folded into layer1.conv1"),),
            (Refusal("layer2.bn1", "its input has two users"),),
        ),
        reference_latency_ms=4.56,
        files=(
            ShippedFile(
                "model.fp32.onnx",
                "fp32",
                312_431,
                1.23,
                (),
                Verification(360, 3.1e-7, 1.4e-5, 1.0, 0.9781, 0.9782, 0.001, True),
            ),
            ShippedFile(
                "model.int8.onnx",
                "int8",
                88_214,
                0.789,
                ("BatchNormalization_3",),
                Verification(360, 0.043, 0.217, 0.9917, 0.9781, 0.9699, 0.02, False),
            ),
        ),
        passed=False,
    )
