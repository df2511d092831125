"""The training scripts, end to end on a CPU: texts to tokens, tokens to a checkpoint for transformers."""

import importlib
import json
import lzma
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import MptForCausalLM

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "training"))  # scripts, not part of the package

prepare = importlib.import_module("prepare")
train = importlib.import_module("train")

# 3 heads, because their ALiBi slopes come in another order than those of a power of two.
SHAPE = train.Shape(vocab_size=320, d_model=48, n_layers=2, n_heads=3)


def tell_stories(n_documents: int, seed: int) -> list[str]:
    """Return n_documents short distinct texts with a little grammar to learn."""
    rng = random.Random(seed)
    who = ["the fox", "a king", "the old miller", "her sister", "a small grey mouse"]
    does = ["found", "lost", "carried", "painted", "asked for", "never saw"]
    what = ["a golden key", "the bread", "seven apples", "a letter from the sea", "his hat"]

    def sentence() -> str:
        return f"{rng.choice(who)} {rng.choice(does)} {rng.choice(what)}.".capitalize()

    return [
        f"Story {number}.\n\n" + " ".join(sentence() for _ in range(rng.randint(2, 5))) for number in range(n_documents)
    ]


def as_corpus(documents: list[str]) -> str:
    return "".join(f"{document}\n<|endoftext|>\n" for document in documents)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A corpus in one plain and one xz file, its tokens, and a tiny model trained on them."""
    folder = tmp_path_factory.mktemp("training")
    corpus, tokens, model = folder / "corpus", folder / "tokens", folder / "model"
    documents = tell_stories(300, seed=7)
    corpus.mkdir()
    (corpus / "a.txt").write_text(as_corpus(documents[:150]), encoding="utf-8")
    with lzma.open(corpus / "b.txt.xz", "wt", encoding="utf-8") as file:
        file.write(as_corpus(documents[150:]))

    prepare.main(["--corpus", f"{corpus}", "--out", f"{tokens}", "--vocab-size", "320", "--val-every", "10"])
    sizes = ["--d-model", "48", "--n-layers", "2", "--n-heads", "3", "--context", "48", "--batch-size", "8"]
    run = ["--learning-rate", "0.02", "--minutes", "5", "--max-steps", "60", "--seed", "3", "--device", "cpu"]
    first_loss, last_loss = train.main(["--tokens", f"{tokens}", "--out", f"{model}", *sizes, *run])
    return SimpleNamespace(documents=documents, tokens=tokens, model=model, first_loss=first_loss, last_loss=last_loss)


def test_packed_tokens_decode_to_every_document_once(trained: SimpleNamespace) -> None:
    tokenizer = Tokenizer.from_file(str(trained.tokens / "tokenizer.json"))
    read_back = {}
    for name in ("train", "val"):
        token_ids = np.load(trained.tokens / f"{name}.npy")
        assert (token_ids.dtype, token_ids[-1]) == (np.uint16, 0)
        text = tokenizer.decode(token_ids.tolist(), skip_special_tokens=False)
        read_back[name] = text.removesuffix("<|endoftext|>").split("<|endoftext|>")
    assert sorted(read_back["train"] + read_back["val"]) == sorted(trained.documents)
    assert 10 <= len(read_back["val"]) <= 60  # one in ten of 300, by hash


def test_special_tokens_have_the_ids_of_the_embedded_model(trained: SimpleNamespace) -> None:
    names = ["<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>"]
    small = Tokenizer.from_file(str(trained.tokens / "tokenizer.json"))
    embedded = Tokenizer.from_file(str(ROOT / "samples/mpt-8m/tokenizer.json"))
    assert [small.token_to_id(name) for name in names] == [0, 1, 318, 319]
    assert [embedded.token_to_id(name) for name in names] == [0, 1, 8190, 8191]


def test_tokenizer_gives_unseen_text_back(trained: SimpleNamespace) -> None:
    tokenizer = Tokenizer.from_file(str(trained.model / "tokenizer.json"))
    text = " Zoë's café: 12 % off 🦊🏳️‍🌈 — 東京\r\n\tdef f(x):  return x\x00"  # in NFC, as the tokenizer makes it
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_held_out_documents_stay_held_out_when_files_change(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(as_corpus(tell_stories(200, seed=1)), encoding="utf-8")
    before = prepare.split_documents(prepare.read_documents(tmp_path), 10)
    (tmp_path / "one.txt").rename(tmp_path / "renamed.txt")
    added = tell_stories(200, seed=2)
    (tmp_path / "another.txt").write_text(as_corpus(added), encoding="utf-8")
    after = prepare.split_documents(prepare.read_documents(tmp_path), 10)
    assert before == tuple([text for text in part if text not in added] for part in after)


def test_document_that_occurs_twice_is_kept_once(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("Same.\n<|endoftext|>\nOther.\n<|endoftext|>\nSame.\n", encoding="utf-8")
    (tmp_path / "two.txt").write_text("Same.\n\n", encoding="utf-8")
    assert sorted(prepare.read_documents(tmp_path).values()) == ["Other.", "Same."]


def test_training_lowers_the_validation_loss(trained: SimpleNamespace) -> None:
    assert trained.first_loss == pytest.approx(np.log(320), abs=0.3)  # fresh weights guess evenly
    assert trained.last_loss < 0.5 * trained.first_loss


def test_logits_equal_transformers(trained: SimpleNamespace) -> None:
    reference = MptForCausalLM.from_pretrained(trained.model, dtype=torch.float32).eval()
    ours = train.MPT(SHAPE)
    weights = load_file(trained.model / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    ours.load_state_dict(weights)  # strict: every name and shape is the checkpoint's; values are widened to float32
    token_ids = torch.from_numpy(np.load(trained.tokens / "val.npy")[:192].astype(np.int64)).view(2, 96)
    with torch.no_grad():
        expected = reference(token_ids).logits
        # float32 sums in another order; past the 48 tokens it was trained on, too
        torch.testing.assert_close(ours(token_ids), expected, atol=1e-4, rtol=0)


def test_default_options_make_the_embedded_models_config(tmp_path: Path) -> None:
    options = train.parse_arguments(["--tokens", "tokens", "--out", str(tmp_path)])
    shape = train.Shape(8192, options.d_model, options.n_layers, options.n_heads)
    config_file = ROOT / "samples/mpt-8m/config.json"
    assert train.config_json(shape) == json.loads(config_file.read_text(encoding="utf-8"))
    names = {name: tensor.shape for name, tensor in train.MPT(shape).state_dict().items()}
    embedded = load_file(ROOT / "samples/mpt-8m/model.safetensors")
    assert names == {name: tensor.shape for name, tensor in embedded.items()}


def test_learning_rate_warms_up_stays_and_falls_to_zero() -> None:
    points = [(0, 0.0), (99, 0.1), (199, 0.2), (5000, 0.6), (7000, 0.8), (8000, 1.0)]
    factors = [train.learning_rate_factor(step, fraction_done) for step, fraction_done in points]
    assert factors == pytest.approx([1 / 200, 0.5, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (prepare.main, ["--vocab-size", "259"], "`--vocab-size` must be between 260 and 65536, got 259"),
        (prepare.main, ["--val-every", "1"], "`--val-every` must be at least 2, got 1"),
        (train.main, ["--n-heads", "5"], "`--n-heads` must divide `--d-model` 256, got 5"),
        (train.main, ["--max-steps", "0"], "`--max-steps` must be above 0, got 0"),
    ],
)
def test_bad_option_is_named_with_its_rule(
    main: Callable[[list[str]], object],
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = "--corpus" if main is prepare.main else "--tokens"
    with pytest.raises(SystemExit):
        main([source, str(tmp_path), "--out", str(tmp_path), *options])
    assert capsys.readouterr().err.strip().endswith(f"error: {message}")


def test_corpus_without_documents_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        prepare.main(["--corpus", str(tmp_path), "--out", str(tmp_path)])
    assert str(error.value) == f"no documents in {tmp_path}: it needs *.txt or *.txt.xz files"


def test_too_few_documents_to_hold_one_out_is_an_error() -> None:
    with pytest.raises(SystemExit) as error:
        prepare.split_documents({"1": "Only one."}, 200)
    assert str(error.value) == (
        "`--val-every` 200 splits 1 documents into 1 to train on and 0 held out; both need one at least"
    )


def test_too_few_tokens_for_a_window_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "val.npy", np.zeros(512, dtype=np.uint16))
    with pytest.raises(SystemExit) as error:
        train.load_tokens(tmp_path / "val.npy", context=512, device="cpu")
    assert str(error.value) == f"{tmp_path / 'val.npy'} holds 512 tokens; one window needs `--context` + 1 = 513"
