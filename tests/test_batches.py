"""`Tokenizer`: where a prompt ends and its target begins, for every kind of tokenizer, and what a batch holds."""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_malmen import EditorConfig, FactError
from hf_malmen.batches import IGNORED, TokenBatch, Tokenizer, TokenSequence, find_subject
from hf_malmen.tasks import Classes

CORPUS = ["The country of Lyon is France", "Quito lies in Ecuador, high up", "Is it true? It is.", "naïve 東京 café"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
TEXTS = [
    ("The country of Lyon is", "Ecuador"),
    ("Quito lies in", "France, high up"),
    ("Is it true?", "It is"),
    ("The country of Lyon is ", " Ecuador "),
    ("It", "is"),
    ("The country of Lyon is The", "The The"),
]
# WordPiece and the space-merging tokenizers spell these differently when decoded, or do not know them.
HARD_TEXTS = [("The café of 東京 is", "naïve 東京"), ("Quito lies in\n", "Ecuador"), ("Quito  lies  in:\t", "Lyon  is")]


def fast(backend: Backend, **kwargs: Any) -> PreTrainedTokenizerFast:
    """A transformers tokenizer around a backend."""
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **(tokens | kwargs))


def around(template: str) -> processors.TemplateProcessing:
    """A post-processor that puts special tokens around a text."""
    return processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])


def byte_level(template: str | None = None, *, prefix: bool = False, trimmed: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2's and Qwen's: byte-level BPE. Trimmed as Llama 3's, whose offsets leave out the spaces."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    steps: list[Any] = [processors.ByteLevel(trim_offsets=True)] if trimmed else []
    if template:
        steps.append(around(template))
    if steps:
        backend.post_processor = processors.Sequence(steps)
    return fast(backend)


def metaspace(scheme: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """As T5's and Gemma's: SentencePiece unigram pieces, a space written as ▁."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False, max_piece_length=6
    )
    backend.train_from_iterator(CORPUS, trainer)
    if template:
        backend.post_processor = around(template)
    return fast(backend)


def llama_2() -> PreTrainedTokenizerFast:
    """As Llama 2's: the normalizer writes the ▁, nothing splits words, unknown characters fall back to bytes."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))])}
    letters = sorted({"▁", *"".join(CORPUS[:3]).replace(" ", "")})
    vocab |= {letter: len(vocab) + i for i, letter in enumerate(letters)}
    merges = [("▁", "i"), ("▁i", "s"), ("E", "c"), ("▁", "Ec"), ("▁", "F"), ("▁", "▁")]
    vocab |= {"".join(pair): len(vocab) + i for i, pair in enumerate(merges)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = around("<s> $A")
    return fast(backend)


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: the space belongs to no token, and an end token follows every text."""
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=75, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = around("<s> $A </s>")
    return fast(backend)


def single_spaces() -> PreTrainedTokenizerFast:
    """A space is a token of its own: it counts to the target."""
    backend = Backend(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s|\w+|[^\w\s]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return fast(backend)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "byte-level, BOS": lambda: byte_level("<s> $A"),
    "byte-level, EOS": lambda: byte_level("$A </s>"),
    "byte-level, BOS and EOS": lambda: byte_level("<s> $A </s>"),
    "byte-level, prefix space": lambda: byte_level("<s> $A", prefix=True),
    "byte-level, trimmed": lambda: byte_level(trimmed=True),
    "byte-level, trimmed, BOS and EOS": lambda: byte_level("<s> $A </s>", trimmed=True),
    "byte-level, trimmed, prefix space": lambda: byte_level("<s> $A", prefix=True, trimmed=True),
    "metaspace first": lambda: metaspace("first"),
    "metaspace always, EOS": lambda: metaspace("always", "$A </s>"),
    "metaspace never, BOS": lambda: metaspace("never", "<s> $A"),
    "llama 2": llama_2,
    "word piece": word_piece,
    "single spaces": single_spaces,
}
LOSSLESS = ("byte-level", "byte-level, BOS and EOS", "llama 2", "byte-level, trimmed, BOS and EOS")
# Targets whose first word is not merged with the space before it, and one whose is.
SPLIT_TEXTS = [("Quito lies in", target) for target in ("1998", "京都", "zebra", "zebra 1998", "Ecuador")]


@pytest.fixture(scope="module", params=TOKENIZERS)
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """One tokenizer of every kind."""
    return TOKENIZERS[request.param]()


def ids_without_end(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What the tokenizer itself makes of a text, without an end token."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def check_boundary(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, text: str) -> TokenSequence:
    """Everything that must hold of one tokenised fact whose full text is `text`."""
    sequence = Tokenizer(tokenizer, EditorConfig(method="malmen"))(prompt, target)
    ids = ids_without_end(tokenizer, text)
    assert [*sequence.prompt_ids, *sequence.target_ids] == ids
    assert [*sequence.input_ids] == ids[:-1]
    assert tokenizer.decode(list(sequence.target_ids)).strip() == target.strip()
    assert tokenizer.decode(list(sequence.prompt_ids), skip_special_tokens=True).strip() == prompt.strip()
    # Position i predicts token i + 1, and it does so for the target's tokens and no other.
    first = len(sequence.prompt_ids) - 1
    for i, label in enumerate(sequence.labels):
        assert label == (ids[i + 1] if i >= first else IGNORED)
    assert len(sequence) == len(sequence.labels) == len(ids) - 1
    return sequence


@pytest.mark.parametrize(("prompt", "target"), TEXTS)
def test_boundary(any_tokenizer: PreTrainedTokenizerFast, prompt: str, target: str) -> None:
    """Prompt and target decode to themselves, and together are what the tokenizer makes of the joined text."""
    check_boundary(any_tokenizer, prompt, target, f"{prompt.strip()} {target.strip()}")


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize(("prompt", "target"), HARD_TEXTS)
def test_boundary_of_hard_texts(name: str, prompt: str, target: str) -> None:
    """Characters of several bytes, and prompts that end in a line break or tab: those get no space after them."""
    separator = "" if prompt.endswith(("\n", "\t")) else " "
    check_boundary(TOKENIZERS[name](), prompt, target, f"{prompt}{separator}{target}")


def test_targets_of_several_tokens() -> None:
    """The cases above are worth something: some targets are one token long, some many, one word or two."""
    tokenize = Tokenizer(byte_level("<s> $A </s>"), EditorConfig(method="malmen"))
    lengths = [len(tokenize(prompt, target).target_ids) for prompt, target in TEXTS + HARD_TEXTS]
    assert min(lengths) == 1
    assert max(lengths) >= 4


def test_the_space_belongs_to_the_target() -> None:
    """A byte-level tokenizer spells " is" and "is" differently; the model has mostly seen the former."""
    tokenizer = byte_level()
    sequence = Tokenizer(tokenizer, EditorConfig(method="malmen"))("The country of Lyon", "is")
    assert tokenizer.decode(list(sequence.target_ids)) == " is"
    assert len(sequence.target_ids) == 1


@pytest.mark.parametrize("template", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("prefix", [False, True])
def test_a_space_of_its_own_belongs_to_the_target(template: str | None, prefix: bool) -> None:
    """Also where the offsets leave spaces out, so that it spans nothing: they change nothing of what is asked for."""
    plain, trimmed = (byte_level(template, prefix=prefix, trimmed=cut) for cut in (False, True))
    for prompt, target in [*SPLIT_TEXTS, *TEXTS, *HARD_TEXTS]:
        separator = "" if prompt.endswith(("\n", "\t")) else " "
        expected = check_boundary(plain, prompt, target, f"{prompt.rstrip(' ')}{separator}{target.strip()}")
        assert Tokenizer(trimmed, EditorConfig(method="malmen"))(prompt, target) == expected
        assert two_sided(trimmed)(prompt, target) == two_sided(plain)(prompt, target)
    for prompt, target in SPLIT_TEXTS[:-1]:
        ids = Tokenizer(trimmed, EditorConfig(method="malmen"))(prompt, target).target_ids
        assert trimmed.convert_ids_to_tokens(ids[0]) == "Ġ"
        assert trimmed.decode(list(ids)) == f" {target}"


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize(("prompt", "target"), SPLIT_TEXTS)
def test_boundary_of_targets_apart_from_their_space(name: str, prompt: str, target: str) -> None:
    """As of any other target; a text of the vocabulary's bytes and characters alone comes back as it was."""
    check_boundary(TOKENIZERS[name](), prompt, target, f"{prompt} {target}")


class SlowTokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """A tokenizer in plain Python, which knows no character offsets: words with the space before them."""

    def __init__(self, vocabulary: dict[str, int], *, end: bool, **kwargs: Any) -> None:
        self.vocabulary, self.end = vocabulary, end
        super().__init__(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.vocabulary)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return re.findall(WORDS, text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.vocabulary.get(token, self.vocabulary["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        return {i: token for token, i in self.vocabulary.items()}[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, first: list[int], second: list[int] | None = None) -> list[int]:
        return [1, *first, 2] if self.end else [1, *first]


WORDS = r" ?\w+| ?[^\w\s]+|\s"


@pytest.mark.parametrize("end", [False, True])
def test_a_tokenizer_without_offsets_gives_the_same(end: bool) -> None:
    """The fallback for tokenizers in Python agrees with a fast one of the same rules."""
    backend = Backend(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    backend.decoder = decoders.Fuse()
    texts = [*CORPUS, *(prompt for prompt, _ in TEXTS)]
    backend.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    backend.post_processor = around("<s> $A </s>" if end else "<s> $A")
    quick, slow = fast(backend), SlowTokenizer(backend.get_vocab(), end=end)
    assert quick.is_fast
    assert not slow.is_fast
    for prompt, target in TEXTS:
        text = f"{prompt.strip()} {target.strip()}"
        assert slow(text)["input_ids"] == quick(text)["input_ids"]
        expected = check_boundary(quick, prompt, target, text)
        assert check_boundary(slow, prompt, target, text) == expected
        for subject in prompt.split():
            positions = [
                Tokenizer(one, EditorConfig(method="malmen")).subject_position(prompt, target, subject)
                for one in (quick, slow)
            ]
            assert positions[0] == positions[1]


def test_a_slow_tokenizer_with_a_target_that_repeats_the_prompt() -> None:
    """The boundary is where the joined text leaves the prompt, also if the next token is the one before."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "is", " is"])}
    slow = SlowTokenizer(vocabulary, end=True)
    sequence = Tokenizer(slow, EditorConfig(method="malmen"))("is is is", "is is")
    assert sequence == TokenSequence((1, 4, 5, 5, 5), (IGNORED, IGNORED, IGNORED, 5, 5))


# Prompt formats


@pytest.mark.parametrize("add_bos", [False, True])
def test_chat_template(make_tokenizer: Callable[..., PreTrainedTokenizerFast], add_bos: bool) -> None:
    """The prompt is a user's message, exactly as in a chat that waits for the answer; special tokens come once."""
    tokenizer = make_tokenizer(add_bos=add_bos)
    for prompt, target in TEXTS:
        sequence = Tokenizer(tokenizer, EditorConfig(method="malmen", use_chat_template=True))(prompt, target)
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert [*sequence.prompt_ids] == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(list(sequence.target_ids)) == target.strip()
        assert tokenizer.bos_token_id not in sequence.input_ids


def test_chat_template_that_is_not_there() -> None:
    """Found when the editor meets the tokenizer, not at the first fact."""
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        Tokenizer(byte_level(), EditorConfig(method="malmen", use_chat_template=True))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Q: {prompt}\nA:", "Q: It lies in\nA: Lyon"),
        ("Q: {prompt}\nA: ", "Q: It lies in\nA: Lyon"),
        ("### {prompt}\n", "### It lies in\nLyon"),
        ("{prompt}", "It lies in Lyon"),
        ('{"question": "{prompt}", "answer":', '{"question": "It lies in", "answer": Lyon'),
        ("{prompt} / {prompt}:", "It lies in / It lies in: Lyon"),
    ],
)
def test_prompt_template(template: str, text: str) -> None:
    """The template goes around the prompt; only `{prompt}` is replaced."""
    tokenizer = byte_level("<s> $A")
    sequence = Tokenizer(tokenizer, EditorConfig(method="malmen", prompt_template=template))("It lies in", "Lyon")
    assert [*sequence.prompt_ids, *sequence.target_ids] == tokenizer(text)["input_ids"]
    assert tokenizer.decode(list(sequence.target_ids)).strip() == "Lyon"


def test_braces_in_a_prompt_are_text() -> None:
    """A prompt is never read as a template."""
    tokenizer = byte_level()
    sequence = Tokenizer(tokenizer, EditorConfig(method="malmen", prompt_template="Q: {prompt}\nA:"))(
        "{prompt} {0} {", "Lyon"
    )
    assert tokenizer.decode(list(sequence.prompt_ids)) == "Q: {prompt} {0} {\nA:"


# What cannot be tokenised


def test_too_long_for_the_model() -> None:
    """The last target token is only predicted, not read. One token too many is an error, never a cut."""
    tokenizer = byte_level("<s> $A")
    prompt, target = TEXTS[0]
    length = len(tokenizer(f"{prompt} {target}")["input_ids"]) - 1
    assert len(Tokenizer(tokenizer, EditorConfig(method="malmen"), max_length=length)(prompt, target)) == length
    with pytest.raises(
        FactError, match=rf"takes {length} tokens with its target, and the model reads at most {length - 1}"
    ):
        Tokenizer(tokenizer, EditorConfig(method="malmen"), max_length=length - 1)(prompt, target)


def test_a_target_without_tokens() -> None:
    """A tokenizer may delete characters; a target of nothing but those cannot be learned."""
    tokenizer = byte_level("<s> $A </s>")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(FactError, match=r"The prompt 'It lies in\\n' with the target '\\u200b' gives the tokens"):
        Tokenizer(tokenizer, EditorConfig(method="malmen"))("It lies in\n", "\u200b")


def test_a_target_at_the_very_start() -> None:
    """Without a BOS token nothing precedes the target of an empty prompt, so nothing can predict it."""
    assert Tokenizer(byte_level("<s> $A"), EditorConfig(method="malmen"))("", "Lyon").prompt_ids == (1,)
    with pytest.raises(FactError, match="no token that follows a prompt token"):
        Tokenizer(byte_level(), EditorConfig(method="malmen"))("", "Lyon")


# Batches


def sequences_of(lengths: list[int]) -> list[TokenSequence]:
    """Sequences of these lengths with distinct contents; the last token of each is its answer position."""
    return [
        TokenSequence(tuple(range(10 * i + 1, 10 * i + 1 + n)), (*[IGNORED] * (n - 1), 100 + i))
        for i, n in enumerate(lengths)
    ]


def test_pad_right_and_left() -> None:
    """By hand: tokens, mask and labels."""
    batch_of = Tokenizer(byte_level(), EditorConfig(method="malmen")).pad
    sequences = sequences_of([3, 1])
    right, left = batch_of(sequences, "right"), batch_of(sequences, "left")
    assert right.input_ids.tolist() == [[1, 2, 3], [11, 0, 0]]
    assert right.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert right.labels.tolist() == [[IGNORED, IGNORED, 100], [101, IGNORED, IGNORED]]
    assert left.input_ids.tolist() == [[1, 2, 3], [0, 0, 11]]
    assert left.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left.labels.tolist() == [[IGNORED, IGNORED, 100], [IGNORED, IGNORED, 101]]
    assert right.input_ids.dtype == right.labels.dtype == torch.int64


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad_on_the_right_by_default(side: str, make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    """Whatever the tokenizer prefers: what a model reads must not depend on it."""
    tokenize = Tokenizer(make_tokenizer(padding_side=side), EditorConfig(method="malmen"))
    assert tokenize.pad(sequences_of([2, 4])).input_ids.tolist() == [[1, 2, 0, 0], [11, 12, 13, 14]]


def test_a_tokenizer_without_a_padding_token() -> None:
    """GPT-2's has none; masked positions are never read, so any id serves, also where 0 is a real token."""
    tokenize = Tokenizer(fast(byte_level().backend_tokenizer, pad_token=None), EditorConfig(method="malmen"))
    assert tokenize.pad_token_id == 0
    assert tokenize.pad(sequences_of([2, 1])).input_ids.tolist() == [[1, 2], [11, 0]]


def test_selected_tokens() -> None:
    """The answer positions, or all that are not padding."""
    batch = Tokenizer(byte_level(), EditorConfig(method="malmen")).pad(sequences_of([3, 1]), "left")
    assert batch.selected("answer").tolist() == [[False, False, True], [False, False, True]]
    assert batch.selected("all").tolist() == [[True, True, True], [False, False, True]]


def rows_of(batch: TokenBatch) -> Iterator[TokenSequence]:
    """The sequences of a batch, read back off its mask."""
    for ids, mask, labels in zip(batch.input_ids, batch.attention_mask.bool(), batch.labels, strict=True):
        assert (labels[~mask] == IGNORED).all()
        yield TokenSequence(tuple(ids[mask].tolist()), tuple(labels[mask].tolist()))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_batches_hold_every_sequence_once(
    batch_size: int, side: str, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    """Also those of a last, short batch; the positions say which is where, and no batch is too large."""
    sequences = sequences_of([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    tokenize = Tokenizer(make_tokenizer(padding_side=side), EditorConfig(method="malmen"))
    seen = []
    sizes = []
    for chosen, batch in tokenize.batches(sequences, batch_size):
        assert list(rows_of(batch)) == [sequences[i] for i in chosen]
        assert batch.input_ids.shape[1] == max(len(sequences[i]) for i in chosen)
        seen += chosen
        sizes.append(len(chosen))
    assert sorted(seen) == list(range(len(sequences)))
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert sum(sizes) == len(sequences)


def test_batches_group_by_length() -> None:
    """So that little is padding: the padded area is the smallest that this batch size allows."""
    tokenize = Tokenizer(byte_level(), EditorConfig(method="malmen"))
    batches = list(tokenize.batches(sequences_of([1, 9, 1, 9, 1, 9]), 3))
    assert sum(batch.input_ids.numel() for _, batch in batches) == 3 * 9 + 3 * 1


@pytest.mark.parametrize("batch_size", [3, 100])
@pytest.mark.parametrize("pass_cost", [0, 2, 5, 1000])
def test_batches_are_cut_where_padding_and_passes_cost_least(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], batch_size: int, pass_cost: int
) -> None:
    """The cost is the least that any way to cut nine sequences has, and every sequence is there once."""
    tokenize = Tokenizer(make_tokenizer(), EditorConfig(method="malmen"))
    lengths = [5, 21, 3, 9, 9, 4, 20, 12, 3]
    sequences = [TokenSequence((7,) * length, (3,) * length) for length in lengths]
    found = list(tokenize.batches(sequences, batch_size, pass_cost))
    assert sorted(i for chosen, _ in found for i in chosen) == list(range(9))
    assert max(len(chosen) for chosen, _ in found) <= batch_size
    ordered = sorted(lengths, reverse=True)
    costs = []
    for cuts in itertools.product([False, True], repeat=8):
        ends = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 9]
        parts = [ordered[a:b] for a, b in itertools.pairwise(ends)]
        if max(map(len, parts)) <= batch_size:
            costs.append(sum(part[0] * len(part) + pass_cost for part in parts))
    assert sum(batch.input_ids.numel() + pass_cost for _, batch in found) == min(costs)


def test_batches_of_nothing() -> None:
    """No sequence, no batch."""
    assert list(Tokenizer(byte_level(), EditorConfig(method="malmen")).batches([], 4)) == []


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batches_of_an_impossible_size(batch_size: int) -> None:
    """The message names the argument and its value."""
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}; expected a whole number of at least 1"):
        list(Tokenizer(byte_level(), EditorConfig(method="malmen")).batches(sequences_of([1]), batch_size))


# Encoder-decoders and classifiers


def two_sided(tokenizer: PreTrainedTokenizerBase, **config: Any) -> Tokenizer:
    """For an encoder-decoder whose decoder starts with token 0."""
    return Tokenizer(
        tokenizer, EditorConfig(method="malmen", task_type="SEQ_2_SEQ_LM", **config), decoder_start_token_id=0
    )


def test_encoder_decoder_sequences(any_tokenizer: PreTrainedTokenizerFast) -> None:
    """The encoder reads the prompt as the tokenizer writes it; the decoder what it must answer, shifted by one."""
    for prompt, target in TEXTS:
        sequence = two_sided(any_tokenizer)(prompt, target)
        assert list(sequence.input_ids) == any_tokenizer(prompt)["input_ids"] == list(sequence.prompt_ids)
        answer = ids_without_end(any_tokenizer, target.strip())
        assert list(sequence.decoder_input_ids) == [0, *answer[:-1]]
        # Special tokens before the answer, as BART has them, are read and not asked.
        begin = answer[0] == any_tokenizer.bos_token_id
        assert list(sequence.labels) == [IGNORED] * begin + answer[begin:]
        assert list(sequence.target_ids) == answer[begin:]


def test_encoder_decoder_batches() -> None:
    """By hand: each side with its own mask, labels as long as the decoder's side, and sides of different lengths."""
    tokenize = two_sided(byte_level())
    long = TokenSequence((11, 12, 13), (21, 22), (0, 21))
    batch = tokenize.pad([long, TokenSequence((14,), (IGNORED, 23, 24), (0, 1, 23))])
    assert batch.input_ids.tolist() == [[11, 12, 13], [14, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.decoder_input_ids is not None and batch.decoder_attention_mask is not None
    assert batch.decoder_input_ids.tolist() == [[0, 21, 0, 0], [0, 1, 23, 0]]
    assert batch.decoder_attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.labels.tolist() == [[21, 22, IGNORED, IGNORED], [IGNORED, 23, 24, IGNORED]]
    for selection in ("answer", "all"):
        assert batch.traced_rows(selection, 6).tolist() == [True, True, True, True, False, False]  # type: ignore[union-attr]
        decoder = batch.traced_rows(selection, 8)
        assert decoder is not None and decoder.tolist() == [True, True, False, False, True, True, True, False]
        assert batch.traced_rows(selection, 7) is None
    assert tokenize.pad([long]).decoder_input_ids.shape == (1, 2)  # type: ignore[union-attr]
    moved = batch.to("cpu")
    assert moved.decoder_input_ids is not None and moved.decoder_input_ids.equal(batch.decoder_input_ids)
    assert batch.to("meta") is batch


def test_an_encoder_decoder_that_does_not_say_how_it_starts() -> None:
    """T5's configuration has no default."""
    tokenize = Tokenizer(byte_level(), EditorConfig(method="malmen", task_type="SEQ_2_SEQ_LM"))
    with pytest.raises(ValueError, match=r"config\.decoder_start_token_id"):
        tokenize("It lies in", "Lyon")


def test_an_encoder_decoders_target_without_tokens() -> None:
    """As of a causal language model."""
    tokenizer = byte_level("<s> $A </s>")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(FactError, match=r"The target '\\u200b' gives the tokens \[1, 2\], none of them its own"):
        two_sided(tokenizer)("It lies in", "\u200b")


def classifier(tokenizer: PreTrainedTokenizerBase, **classes: Any) -> Tokenizer:
    """For a classifier with two labels."""
    settings: dict[str, Any] = {"ids": {"REFUTES": 0, "SUPPORTS": 1}, "count": 2} | classes
    return Tokenizer(
        tokenizer, EditorConfig(method="malmen", task_type="SEQ_CLS"), max_length=12, classes=Classes(**settings)
    )


def test_class_at_the_token_that_the_head_reads() -> None:
    """The first token of an encoder's text; of a decoder's the last that is not padding in its eyes."""
    tokenizer = byte_level("<s> $A </s>")
    ids = tokenizer("It is")["input_ids"]
    rest = [IGNORED] * (len(ids) - 1)
    assert classifier(tokenizer)("It is", "SUPPORTS") == TokenSequence(tuple(ids), (1, *rest))
    assert classifier(tokenizer, at_end=True, pad_token_id=0)("It is", "REFUTES").labels == (*rest, 0)
    assert classifier(tokenizer, at_end=True, pad_token_id=2)("It is", "1").labels == (*rest[1:], 1, IGNORED)
    assert classifier(tokenizer, at_end=True, pad_token_id=2).pad_token_id == 2
    sequence = classifier(tokenizer)("It is", "SUPPORTS")
    assert sequence.target_ids == (1,) and classifier(tokenizer).pad([sequence]).decoder_input_ids is None


@pytest.mark.parametrize(
    ("target", "index"), [("REFUTES", 0), ("SUPPORTS", 1), (" supports ", 1), ("0", 0), ("1", 1)]
)  # fmt: skip
def test_targets_that_name_a_class(target: str, index: int) -> None:
    """By label, by label in another case, or by index."""
    assert classifier(byte_level())("It is", target).target_ids == (index,)


@pytest.mark.parametrize("target", ["true", "2", "-1", "1.0", "²"])
def test_targets_that_name_no_class(target: str) -> None:
    """The labels are listed."""
    with pytest.raises(
        FactError, match=r"is no class of this model\. Its labels: 'REFUTES', 'SUPPORTS'; or an index from 0 to 1"
    ):
        classifier(byte_level())("It is", target)


def test_labels_before_indices() -> None:
    """A label may be a number; two that differ in case alone are told apart by it."""
    assert Classes({"1": 0, "0": 1}, 2).index("1") == 0
    twins = Classes({"us": 0, "US": 1}, 2)
    assert (twins.index("us"), twins.index("US")) == (0, 1)
    with pytest.raises(FactError, match="no class"):
        twins.index("Us")


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "SEQ_2_SEQ_LM"])
def test_templates_and_limits_of_a_prompt_alone(
    task_type: str, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    """Nothing of the target is in what the model reads; too long a prompt, or none, is refused."""
    tokenizer = make_tokenizer(add_bos=True)

    def read(prompt: str, **config: Any) -> str:
        classes = Classes({"France": 0, "Italy": 1}, 2)
        settings = EditorConfig(method="malmen", task_type=task_type, **config)
        tokenize = Tokenizer(tokenizer, settings, 20, decoder_start_token_id=0, classes=classes)
        return tokenizer.decode(list(tokenize(prompt, "France").input_ids))

    assert read("Lyon is in") == "<s>Lyon is in"
    assert read("Lyon is in", prompt_template="Q: {prompt} {}?") == "<s>Q: Lyon is in {}?"
    assert read("Lyon is in", use_chat_template=True) == "<|user|>Lyon is in<|end|><|assistant|>"
    with pytest.raises(FactError, match=r"takes \d+ tokens.*at most 20"):
        read("Lyon " * 30)
    tokenizer = make_tokenizer()
    with pytest.raises(FactError, match="gives no tokens"):
        read("")


# Where a subject ends


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The country of Lyon is", "Lyon"),
        ("The country of Lyon is", "country of Lyon is"),
        ("of Quito lies in", "Quito"),
        ("Is it true?", "it"),
        ("  The country of Lyon is ", "Lyon "),
        ("The COUNTRY is a country", "Country"),
    ],
)
def test_subject_ends_where_its_last_character_is_read(name: str, prompt: str, subject: str) -> None:
    """The text read up to that token has the subject as often as the prompt, and one token less lacks it once."""
    tokenizer = TOKENIZERS[name]()
    tokenize = Tokenizer(tokenizer, EditorConfig(method="malmen"))
    ids = tokenize(prompt, "Ecuador").input_ids
    position = tokenize.subject_position(prompt, "Ecuador", subject)
    assert 0 < position < len(tokenize(prompt, "Ecuador").prompt_ids)
    # Whole words: tokenizers write what stands between them in their own ways.
    wanted = "".join(subject.split()).lower()

    def count(n: int) -> int:
        return "".join(tokenizer.decode(ids[:n], skip_special_tokens=True).split()).lower().count(wanted)

    if "<unk>" not in tokenizer.decode(ids):
        assert count(position + 1) == count(len(ids)) > count(position)


@pytest.mark.parametrize(
    ("before", "subject", "behind"),
    [
        ("Compared with ", "Niger", " in size, the neighbour Nigeria is"),
        ("The moon of ", "mars", " is smaller than Marseille"),  # other letter case, but a word
        ("Nigeria has ", "Niger", "'s"),
        ("After Apollo 11 and ", "Apollo 1", ", Apollo 12 is"),
        ("Der ", "Ö", " heißt wie Öl und MÖ"),
        ("", "Fiji", ", an island: the Fijian language is"),
        ("法国和", "法国", "的首都是"),  # written without spaces
        ("프랑스와 ", "프랑스", "의 수도는"),
        ("The name of C and ", "C++", "17 is"),
        ("In ", "Niger", "ia"),  # nothing else
    ],
)
def test_subject_is_a_word_of_its_own(before: str, subject: str, behind: str) -> None:
    """The last one that is; part of a longer word only where there is nothing else."""
    assert find_subject(before + subject + behind, subject) == len(before)
    around = f"{subject} {before}", f"{behind} {subject}"
    assert find_subject(subject.join(around), subject, len(subject) + 1, -len(subject) - 1) == len(around[0])


def test_subject_in_a_template_or_a_chat() -> None:
    """It is looked for in the prompt, not in what a template puts around it."""
    tokenizer = byte_level()
    plain = Tokenizer(tokenizer, EditorConfig(method="malmen", prompt_template="is Lyon? {prompt} of Lyon is:"))
    ids = plain("The country of Lyon", "France").input_ids
    position = plain.subject_position("The country of Lyon", "France", "Lyon")
    assert tokenizer.decode(ids[: position + 1]) == "is Lyon? The country of Lyon"
    tokenizer.chat_template = "{% for message in messages %}<s>{{ message['content'] | trim }}</s>{% endfor %}"
    chat = Tokenizer(tokenizer, EditorConfig(method="malmen", use_chat_template=True))
    ids = chat("The country of Lyon is", "Lyon").input_ids
    position = chat.subject_position("The country of Lyon is", "Lyon", "Lyon")
    assert tokenizer.decode(ids[: position + 1]) == "<s>The country of Lyon"


def test_subject_that_is_not_in_the_prompt_is_an_error() -> None:
    """Names both, and says what to do."""
    tokenize = Tokenizer(byte_level(), EditorConfig(method="malmen"))
    with pytest.raises(FactError, match=r"subject 'France' does not occur in the prompt 'Lyon is in'\. Give the sub"):
        tokenize.subject_position("Lyon is in", "France", "France")
