"""Text to tokens and back, whole and in pieces: equal to the library's decoding and to a naive search for stops."""

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, processors
from tokenizers import Tokenizer as LibraryTokenizer

from mptserve.errors import ModelNotFound
from mptserve.tokenizer import TextStream, Tokenizer

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "samples" / "mpt-8m" / "tokenizer.json"
PUBLISHED = ROOT.parent / "shared" / "tokenizer" / "tokenizer.json"
PROPERTY = settings(deadline=None, database=None, max_examples=150)
Spell = Callable[[str], tuple[Tokenizer, list[int]]]

TEXTS = [
    "",
    "The meaning of life is 42.\n\tdef f(x):  return x\r\n",
    "many            spaces and\n\n\n\n\nlines",
    "naïve café, Ω ≈ 3.14 × 10⁻³, „Größe“",
    "こんにちは世界、東京は今日も晴れです。中文 한국어",
    "🦊 🏳️‍🌈 👩‍👩‍👧‍👦 🇪🇺 1️⃣",
    "Z̸̢̛a̶͎͗l̵̰̏g̷̣̈o and é from two code points",
    "עברית العربية हिन्दी ไทย",
    "\x00\x01\x7f\ufeff\ufffd\u2028",
]


@pytest.fixture(scope="module", params=[EMBEDDED, PUBLISHED], ids=["embedded model's", "MPT-7B's"])
def path(request: pytest.FixtureRequest) -> Path:
    if not request.param.is_file():
        pytest.skip("the GPT-NeoX tokenizer is not beside this checkout")
    return request.param


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


@pytest.fixture(scope="module")
def library(path: Path) -> LibraryTokenizer:
    return LibraryTokenizer.from_file(str(path))


def pieces(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """Return what a stream of `ids` shows, token by token and at its end."""
    stream = TextStream(tokenizer, stop)
    return [*(stream.push(id) for id in ids), stream.finish()]


# Whole ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_way_to_tokens_and_back(tokenizer: Tokenizer, library: LibraryTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)  # what both tokenizers make of it first


@PROPERTY
@given(data=st.data())
def test_decoding_equals_the_librarys(tokenizer: Tokenizer, library: LibraryTokenizer, data: st.DataObject) -> None:
    """Any ids: bytes that are no UTF-8, special tokens, and ids that no token has."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.n_tokens + 200) | st.integers(0, 300), max_size=40))
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)


def test_every_single_token_decodes_as_in_the_library(tokenizer: Tokenizer, library: LibraryTokenizer) -> None:
    ids = range(tokenizer.n_tokens)
    assert [tokenizer.decode([id]) for id in ids] == library.decode_batch(
        [[id] for id in ids], skip_special_tokens=True
    )
    assert tokenizer.longest_token == max(len(tokenizer.token_bytes(id)) for id in ids)


def test_special_token_written_out_is_read_as_one_and_never_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|endoftext|>b")
    assert ids == [*tokenizer.encode("a"), 0, *tokenizer.encode("b")]
    assert (tokenizer.decode(ids), tokenizer.token_bytes(0)) == ("ab", b"")


def test_shapes_of_the_two_tokenizers(path: Path, tokenizer: Tokenizer) -> None:
    expected = {EMBEDDED: (8192, 15), PUBLISHED: (50277, 512)}
    assert (tokenizer.n_tokens, tokenizer.longest_token) == expected[path]


def test_file_that_is_no_tokenizer_says_so(tmp_path: Path) -> None:
    for content in ("{}", "not JSON"):
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
        with pytest.raises(ModelNotFound) as caught:
            Tokenizer(tmp_path / "tokenizer.json")
        assert str(caught.value).startswith(f"{tmp_path / 'tokenizer.json'} is not a tokenizer.json: ")


# A tokenizer with everything that the published ones do not have -----------------------------------------------------


@pytest.fixture
def odd(tmp_path: Path) -> tuple[Tokenizer, LibraryTokenizer]:
    """Ids with holes, a shown added token, a beginning-of-text token, truncation and padding switched on."""
    made = LibraryTokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "Ġ": 3, "z": 9}, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<s>"])
    made.add_tokens([AddedToken("«x y»", special=False)])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    made.enable_truncation(2)
    made.enable_padding(length=8)
    made.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer(tmp_path / "tokenizer.json"), made


def test_tokenizer_with_holes_knows_its_largest_id(odd: tuple[Tokenizer, LibraryTokenizer]) -> None:
    tokenizer, made = odd
    vocabulary = made.get_vocab(with_added_tokens=True)
    assert tokenizer.n_tokens == max(vocabulary.values()) + 1
    assert sorted(vocabulary.values()) == [0, 1, 2, 3, 5, 6, 9]
    assert [tokenizer.token_bytes(id) for id in (4, 7, 8, 10, 10**6)] == [b""] * 5
    assert tokenizer.decode([0, 4, 2, 10**6, 5, 9]) == "aabz"


def test_encoding_neither_adds_cuts_nor_pads(odd: tuple[Tokenizer, LibraryTokenizer]) -> None:
    tokenizer, _ = odd
    assert tokenizer.encode("abaaaba") == [2, 0, 0, 2, 0]
    assert tokenizer.encode("") == []
    assert tokenizer.decode(tokenizer.encode("ab«x y»a<s>b")) == "ab«x y»ab"


# Piece by piece ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_a_text_join_to_the_whole(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    found = pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids)
    assert [p for p in found if "\ufffd" in p] == (["\ufffd"] if "\ufffd" in text else [])


@PROPERTY
@given(data=st.data())
def test_pieces_of_any_tokens_join_to_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Tokens of one byte make most sequences no UTF-8 at all."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.n_tokens + 5) | st.integers(0, 300), max_size=40))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_half_a_character_waits_for_its_other_half(tokenizer: Tokenizer) -> None:
    by_byte = {tokenizer.token_bytes(id): id for id in range(tokenizer.n_tokens)}
    ids = [by_byte[bytes([b])] for b in "a🦊é".encode()]
    assert pieces(tokenizer, ids) == ["a", "", "", "", "🦊", "", "é", ""]
    assert pieces(tokenizer, ids[:3]) == ["a", "", "", "\ufffd"]
    assert pieces(tokenizer, [*ids[:3], ids[0]]) == ["a", "", "", "\ufffda", ""]


# Stop strings --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spell() -> Spell:
    """Return a function from text to (tokenizer, ids), one id for each byte."""
    tokenizer = Tokenizer(EMBEDDED)
    by_byte = {tokenizer.token_bytes(id): id for id in range(tokenizer.n_tokens)}
    return lambda text: (tokenizer, [by_byte[bytes([b])] for b in text.encode()])


STOPPED = [
    # text, stop strings, what each byte's token shows, and the end
    ("abc", ("x",), ["a", "b", "c", ""]),
    ("abXYcd", ("XY",), ["a", "b", "", "", "", "", ""]),
    ("abXcd", ("XY",), ["a", "b", "", "Xc", "d", ""]),
    ("abX", ("XY",), ["a", "b", "", "X"]),
    ("aaab", ("aab",), ["", "", "a", "", ""]),
    ("ababac", ("abac",), ["", "", "", "ab", "", "", ""]),
    ("aaa", ("aaa",), ["", "", "", ""]),
    ("xab", ("ab",), ["x", "", "", ""]),
    ("Xx", ("X",), ["", "", ""]),
    ("a\n\nb", ("\n\n", "\n"), ["a", "", "", "", ""]),
    ("x##y###z", ("###", "##!"), ["x", "", "", "##y", "", "", "", "", ""]),
    ("abcd", ("bcd", "abx"), ["", "", "a", "", ""]),
    ("abcd", ("bcd", "c"), ["a", "", "b", "", ""]),
    ("xabc", ("abc", "bc"), ["x", "", "", "", ""]),
    ("aé🦊b", ("é🦊",), ["a", "", "", "", "", "", "", "", ""]),
    ("aéb", ("é🦊",), ["a", "", "", "éb", ""]),
]


@pytest.mark.parametrize(("text", "stop", "expected"), STOPPED, ids=[f"{t!r} at {s}" for t, s, _ in STOPPED])
def test_stop_string_split_across_tokens_is_not_shown(
    spell: Spell, text: str, stop: tuple[str, ...], expected: list[str]
) -> None:
    tokenizer, ids = spell(text)
    assert pieces(tokenizer, ids, stop) == expected


@PROPERTY
@given(text=st.text("ab🦊", max_size=12), stop=st.lists(st.text("ab🦊", min_size=1, max_size=3), max_size=3))
def test_tokens_pushed_at_once_give_the_text_of_tokens_pushed_one_by_one(
    spell: Spell, text: str, stop: list[str]
) -> None:
    tokenizer, ids = spell(text)
    stream = TextStream(tokenizer, tuple(stop))
    assert stream.push(*ids) + stream.finish() == "".join(pieces(tokenizer, ids, tuple(stop)))


def test_stream_says_when_it_has_stopped(spell: Spell) -> None:
    tokenizer, ids = spell("abXYc")
    stream = TextStream(tokenizer, ("XY",))
    assert [(stream.push(id), stream.stopped) for id in ids] == [
        ("a", False),
        ("b", False),
        ("", False),
        ("", True),
        ("", True),
    ]
    assert (stream.finish(), stream.stopped) == ("", True)


def test_stop_string_inside_one_token_cuts_it() -> None:
    tokenizer = Tokenizer(EMBEDDED)
    (the,) = tokenizer.encode(" the")
    assert pieces(tokenizer, [the, the], ("h",)) == [" t", "", ""]
    assert pieces(tokenizer, [the, the], ("e th",)) == [" th", "", ""]
    assert pieces(tokenizer, [the], ("the", "h")) == [" t", ""], "h is complete first"
    assert pieces(tokenizer, [the], ("e", "he", "the")) == [" ", ""]


def test_special_token_between_the_halves_of_a_stop_string_hides_nothing(spell: Spell) -> None:
    tokenizer, ids = spell("aXYb")
    assert pieces(tokenizer, [ids[0], ids[1], 0, ids[2], ids[3]], ("XY",)) == ["a", "", "", "", "", ""]


def naive(text: str, stop: tuple[str, ...]) -> str:
    """Return `text` up to the stop string that is complete first; of those complete at once, the longest."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


TOKENIZER = Tokenizer(EMBEDDED)
POOL = "ab\n é🦊"
OF_POOL = [
    id
    for id in range(TOKENIZER.n_tokens)
    if (content := TOKENIZER.token_bytes(id)) and set(content) <= set(POOL.encode()) and len(content) < 5
]


@PROPERTY
@given(data=st.data())
def test_stream_equals_a_naive_search_and_holds_back_no_more_than_it_must(data: st.DataObject) -> None:
    stop = tuple(data.draw(st.lists(st.text(st.sampled_from(POOL), min_size=1, max_size=5), min_size=1, max_size=3)))
    ids = data.draw(st.lists(st.sampled_from(OF_POOL), max_size=30))
    stream, decoder, shown = TextStream(TOKENIZER, stop), TextStream(TOKENIZER), ""
    whole, come = TOKENIZER.decode(ids), ""
    for id in ids:
        shown += stream.push(id)
        come += decoder.push(id)
        assert whole.startswith(come)
        assert naive(whole, stop).startswith(shown)
        assert stream.stopped == any(s in come for s in stop)
        if not stream.stopped:
            held = come[len(shown) :]
            assert held == "" or any(s.startswith(held) and s != held for s in stop)
    assert shown + stream.finish() == naive(whole, stop)


def test_property_above_draws_tokens_of_one_byte_and_of_several() -> None:
    lengths = [len(TOKENIZER.token_bytes(id)) for id in OF_POOL]
    assert lengths.count(1) == len(set(POOL.encode()))
    assert len(lengths) > 15
