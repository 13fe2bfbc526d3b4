"""Train an encoder/decoder to translate: numbers in words from English to Chinese, or any corpus of sentence pairs.

    python -m minillm.training.translator numbers --out translator
    python -m minillm.training.translator corpus pairs.tsv --out translator

The first makes the translator that ships in the package; its data is generated (`numbers.py`), endless, and scored
exactly. The second reads a corpus as published by Tatoeba (`parallel.py`) and is scored by BLEU.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minillm.cache.contiguous import ContiguousCache
from minillm.errors import CheckpointError, InvalidRequestError
from minillm.models.loader import num_parameters
from minillm.models.source import ASSETS
from minillm.text import read_json
from minillm.tokenizers.bpe import WORDS_AND_HAN, BytePairTokenizer
from minillm.training.batching import LengthBatches, PairBatch
from minillm.training.command import check_folder, notes, run
from minillm.training.numbers import chinese, english, has_inner_zero, sample
from minillm.training.parallel import Pair, Tokenize, bleu, read_pairs, split_pairs
from minillm.training.schedules import cosine
from minillm.training.trainer import Trainer, TrainingConfig
from minillm.transformer.search import beam_search, check_beams, check_request, greedy_search
from minillm.transformer.seq2seq import Seq2Seq, Seq2SeqConfig

START, STOP = SPECIAL_TOKENS = ("<|start|>", "<|stop|>")
NUMBER_TRANSLATOR = ASSETS / "number_translator"
"""Where the translator of numbers lies that ships in the package."""

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@dataclass(frozen=True)
class Recipe:
    """What decides a translator's weights, beside its sentence pairs.

    Attributes:
        layers: of the encoder, and of the decoder.
        batch_tokens: of one step on the longer side, padding counted.
    """

    vocab_size: int = 320
    hidden_size: int = 128
    num_heads: int = 4
    intermediate_size: int = 512
    layers: int = 3
    dropout: float = 0.0
    label_smoothing: float = 0.0
    steps: int = 1100
    batch_tokens: int = 3072
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    seed: int = 0


NUMBERS = Recipe()
"""1.4 million parameters."""
NUMBER_PAIRS = 200_000
SMALL_NUMBERS = Recipe(hidden_size=96, num_heads=3, intermediate_size=384, layers=2, steps=260)
"""What a notebook trains while you watch."""
CORPUS = Recipe(
    vocab_size=6000,
    hidden_size=256,
    num_heads=4,
    intermediate_size=1024,
    dropout=0.1,
    label_smoothing=0.1,
    steps=3000,
    learning_rate=1e-3,
    warmup_steps=400,
)
"""For some tens of thousands of short sentences."""


@dataclass(frozen=True)
class Translator:
    """An encoder/decoder and the tokenizer that source and target share."""

    model: Seq2Seq
    tokenizer: BytePairTokenizer

    def translate(self, texts: Sequence[str], *, num_beams: int = 1, max_tokens: int | None = None) -> list[str]:
        """The best translation of each text; greedy with one beam.

        Args:
            max_tokens: of a translation at most; the model's context when None.

        Raises:
            InvalidRequestError: no texts, an empty one, one longer than the model's context, or a number out of range.
        """
        max_tokens = self.model.config.max_position_embeddings if max_tokens is None else max_tokens
        sources = [self.tokenizer.encode(text) for text in texts]
        ids = {"start_id": self.tokenizer.token_to_id(START), "stop_id": self.tokenizer.token_to_id(STOP)}
        check_request(self.model, sources, **ids, max_tokens=max_tokens)
        check_beams(num_beams, length_penalty=0)
        kv = ContiguousCache.for_decoder(self.model, len(sources) * num_beams, max_tokens)
        if num_beams == 1:
            found = greedy_search(self.model, sources, **ids, max_tokens=max_tokens, kv=kv)
        else:
            beams = beam_search(self.model, sources, **ids, max_tokens=max_tokens, num_beams=num_beams, kv=kv)
            found = [hypotheses[0].tokens for hypotheses in beams]
        return [self.tokenizer.decode(tokens) for tokens in found]

    def translate_all(self, texts: Sequence[str], *, num_beams: int = 1, batch_size: int = 100) -> list[str]:
        """As `translate`, in batches of texts of like length.

        Raises:
            InvalidRequestError: as `translate`, and for a batch_size below 1.
        """
        if batch_size < 1:
            raise InvalidRequestError(f"batch_size must be at least 1, not {batch_size}")
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        found: dict[int, str] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            translated = self.translate([texts[index] for index in batch], num_beams=num_beams)
            found |= dict(zip(batch, translated, strict=True))
        return [found[index] for index in range(len(texts))]

    def save(self, folder: str | Path) -> None:
        """Write configuration, weights and tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.model.config), indent=2) + "\n", encoding="utf-8")
        save_file(
            {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()},
            folder / "model.safetensors",
        )
        self.tokenizer.save(folder / "tokenizer.json")

    @classmethod
    def load(cls, folder: str | Path = NUMBER_TRANSLATOR) -> Translator:
        """Read what `save` wrote; by default the translator of numbers that ships in the package.

        Raises:
            CheckpointError: the folder does not hold a translator.
        """
        folder = Path(folder)
        try:
            model = Seq2Seq(Seq2SeqConfig(**read_json(folder / "config.json", CheckpointError)))
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, TypeError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} does not hold a translator: {error}") from error
        return cls(model.eval(), BytePairTokenizer.load(folder / "tokenizer.json"))


def make_trainer(pairs: Sequence[Pair], recipe: Recipe) -> tuple[Trainer[Seq2Seq], Translator]:
    """A fresh translator and its training run."""
    some = random.Random(recipe.seed).sample(pairs, min(len(pairs), 20_000))
    texts = (text for pair in some for text in pair)
    tokenizer = BytePairTokenizer.train(texts, recipe.vocab_size, special_tokens=SPECIAL_TOKENS, pattern=WORDS_AND_HAN)
    torch.manual_seed(recipe.seed)
    encoded = [(tokenizer.encode(source), tokenizer.encode(target)) for source, target in pairs]
    lengths = [max(len(source), len(target) + 1) for source, target in encoded]
    model = Seq2Seq(_model_config(recipe, len(tokenizer), longest=max(lengths, default=1)))
    batches = LengthBatches(lengths, recipe.batch_tokens, recipe.seed)
    start_id, stop_id = tokenizer.token_to_id(START), tokenizer.token_to_id(STOP)

    def batch_at(step: int) -> PairBatch:
        return PairBatch.of([encoded[index] for index in batches(step)], start_id, stop_id)

    config = TrainingConfig(
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        schedule=cosine(recipe.steps, min(recipe.warmup_steps, recipe.steps // 10)),
        label_smoothing=recipe.label_smoothing,
        seed=recipe.seed,
    )
    return Trainer(model, batch_at, config), Translator(model, tokenizer)


def _model_config(recipe: Recipe, vocab_size: int, longest: int) -> Seq2SeqConfig:
    return Seq2SeqConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        num_heads=recipe.num_heads,
        intermediate_size=recipe.intermediate_size,
        num_encoder_layers=recipe.layers,
        num_decoder_layers=recipe.layers,
        max_position_embeddings=max(64, 2 * longest),  # others may be longer than those seen in training
        dropout=recipe.dropout,
        norm_placement="pre",
    )


def number_pairs(count: int, seed: int = 0, *, held_out: bool = False) -> list[Pair]:
    """Numbers in words, English and Chinese, from one side of the split."""
    rng = random.Random(f"{seed}/{held_out}")
    return [(english(n), chinese(n)) for n in sample(rng, count, held_out=held_out)]


@dataclass(frozen=True)
class ExactMatch:
    """Shares of numbers translated without any mistake: of all, of those with 零 inside, and by digits.

    Attributes:
        numbers: how many were asked, all different.
    """

    all: float
    inner_zero: float
    by_digits: dict[int, float]
    numbers: int


def exact_match(translator: Translator, count: int = 2000, seed: int = 1) -> ExactMatch:
    """How many held-out numbers come out right, greedily; `count` draws, of which each number counts once.

    Raises:
        InvalidRequestError: for a count below 1.
    """
    if count < 1:
        raise InvalidRequestError(f"count must be at least 1, not {count}")
    numbers = sorted(set(sample(random.Random(seed), count, held_out=True)))
    found = translator.translate_all([english(n) for n in numbers])
    right: dict[str | int, list[bool]] = defaultdict(list)
    for n, text in zip(numbers, found, strict=True):
        groups: list[str | int] = ["all", len(str(n)), *(["zero"] if has_inner_zero(n) else [])]
        for group in groups:
            right[group].append(text == chinese(n))
    share = {group: sum(hits) / len(hits) for group, hits in right.items()}
    by_digits = {digits: share[digits] for digits in sorted(group for group in share if isinstance(group, int))}
    return ExactMatch(share["all"], share.get("zero", 1.0), by_digits, len(numbers))


@app.command()
def numbers(
    out: Annotated[Path, typer.Option(help="Where the translator goes.")] = Path("number_translator"),
) -> None:
    """Train the translator of numbers that ships in the package, and measure it on held-out numbers."""
    check_folder(out)
    trainer, translator = make_trainer(number_pairs(NUMBER_PAIRS), NUMBERS)
    notes.print(f"{num_parameters(translator.model):,} parameters")
    trainer.train()
    translator.save(out)
    result = asdict(exact_match(translator)) | {
        "parameters": num_parameters(translator.model),
        "training_seconds": round(trainer.seconds),
    }
    (out / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    notes.print_json(data=result)


@app.command()
def corpus(
    pairs: Annotated[str, typer.Argument(help="A file or address of tab-separated sentence pairs, or a .zip of one.")],
    out: Annotated[Path, typer.Option(help="Where the translator goes.")] = Path("translator"),
    steps: Annotated[int, typer.Option(min=2, help="How long to train.")] = CORPUS.steps,
    tokenize: Annotated[Tokenize, typer.Option(help="How BLEU cuts the target language: 13a, zh or char.")] = "zh",
) -> None:
    """Train on a corpus of your own, and report BLEU on the sentences held out of it."""
    # What is missing for the end is better known now than after training.
    check_folder(out)
    bleu(["-"], [["-"]], tokenize=tokenize)
    training, held_out = split_pairs(read_pairs(pairs))
    if not held_out:
        raise InvalidRequestError(f"{pairs} has {len(training)} pairs, too few to hold any out: give some hundreds")
    trainer, translator = make_trainer(training, dataclasses.replace(CORPUS, steps=steps))
    notes.print(f"{num_parameters(translator.model):,} parameters, {len(training):,} pairs, {len(held_out):,} held out")
    trainer.train()
    translator.save(out)
    references: dict[str, list[str]] = defaultdict(list)
    for source, target in held_out:
        references[source].append(target)
    context = translator.model.config.max_position_embeddings
    for source in [source for source in references if len(translator.tokenizer.encode(source)) > context]:
        del references[source]
        notes.print(f"not scored, for it is longer than {context} tokens: {escape(source[:60])}…")
    for num_beams in (1, 4):
        found = translator.translate_all(list(references), num_beams=num_beams)
        score = bleu(found, list(references.values()), tokenize=tokenize)
        notes.print(f"{num_beams} beam{'s' if num_beams > 1 else ''}: BLEU {score.score:.2f} ({score.signature})")


if __name__ == "__main__":
    run(app)
