# SPDX-License-Identifier: Apache-2.0
"""A byte-level BPE tokenizer of a few hundred tokens, trained on the spot from a fixed word list.

The 256 byte tokens make every text encodable and every round trip exact (no normaliser, no unknown token). Digits are
one token each, so that a box of four numbers costs as many tokens as it has digits. The T-CoT tags and the most usual
fragments of evidence JSON are whole tokens: a T-CoT of the digits world then takes 30-40 tokens.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EMB_TOKEN = "<emb>"
CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Ordinary (not special) tokens: they survive `skip_special_tokens=True`, so the parser sees them.
TCOT_TOKENS = (
    "<thinking>",
    "</thinking>",
    "<rethink>",
    "</rethink>",
    "<answer>",
    "</answer>",
    '{"bbox_2d":',
    '{"key_frames":',
    '{"text_keywords":',
)
# Letters with an optional leading mark or space; one digit; runs of marks; white space.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = (
    "system user assistant Query Candidate Target target query candidate text image images picture page document video "
    "frame frames clip canvas digits digit numbers number read all the in of a an at is are and with from to for on by "
    "find Find Read Which which What what that shows show contains line printed left right upper lower first last top "
    "bottom middle row order reads bbox none yes no not it its this these ok checked seen here box boxes keywords "
    "key frames evidence relative absolute pixels units write Write give Give answer thinking rethink JSON then tags "
    "Summarize the above content one word Represent given retrieve matching corresponds question Question instruction "
    "second third fourth fifth sixth count how many odd even largest smallest after before between "
    "parcel ticket receipt invoice locker report voucher permit"
)
_MARKS = ('":', '"]}', "]}", '"}', '","', '", "', "[[", "]]", "],[", "], [", '["', " [", " {", ":\n", ".\n")


def build_tokenizer(*, with_emb_token: bool = True) -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same tokens and ids on every call.

    Args:
        with_emb_token: add the special token `<emb>` at whose position an Embedder is read out.

    Returns:
        A fast tokenizer with padding on the left, `<|im_end|>` as end and `<|endoftext|>` as padding token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = [form for word in _WORDS.split() for form in (word, " " + word)] + list(_MARKS)
    tokenizer.train_from_iterator([piece for piece in corpus for _ in range(2)], trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TCOT_TOKENS])
    special = CONTROL_TOKENS + ((EMB_TOKEN,) if with_emb_token else ())
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=list(special),
    )
