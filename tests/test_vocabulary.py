"""The shared vocabulary, and what canonicalization does to probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from verl_trb.vocabulary import (
    SharedVocabulary,
    canonicalize,
    choose_marker,
    from_tokenizers,
    share_vocabulary,
)


def ids(size=8, missing=()):
    return {f"t{i}": i for i in range(size) if i not in missing}


def make(student_eos=6, teacher_eos=7, size=8, **changes):
    given = {"student_rows": size, "teacher_rows": size, "spare_ids": [0]} | changes
    return share_vocabulary(ids(size), ids(size), student_eos=student_eos, teacher_eos=teacher_eos, **given)


@pytest.mark.parametrize(("student_eos", "teacher_eos"), [(2, 5), (5, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_after_canonicalization(student_eos, teacher_eos, dtype):
    """Against float64 probabilities moved by hand, both directions, with padding rows of different number."""
    vocabulary = make(student_eos, teacher_eos, student_rows=10, teacher_rows=13)
    student, teacher = torch.randn(4, 10, dtype=dtype), torch.randn(4, 13, dtype=dtype)
    got_student = canonicalize(student, vocabulary, "student").softmax(-1)
    got_teacher = canonicalize(teacher, vocabulary, "teacher").softmax(-1)
    for i in range(4):
        p, q = np.exp(student[i, :8].double().numpy()), np.exp(teacher[i, :8].double().numpy())
        q[student_eos] += q[teacher_eos]
        p[teacher_eos] = q[teacher_eos] = 0
        np.testing.assert_allclose(got_student[i].double(), p / p.sum(), rtol=1e-5)
        np.testing.assert_allclose(got_teacher[i].double(), q / q.sum(), rtol=1e-5)


def test_one_eos_of_both_is_left_alone():
    vocabulary = make(6, 6)
    logits = torch.randn(3, 8)
    for role in ("student", "teacher"):
        out = canonicalize(logits, vocabulary, role)
        assert torch.equal(out[:, 1:], logits[:, 1:]) and (out[:, 0] == -math.inf).all()  # 0 is the marker


def test_eos_that_one_model_cannot_emit():
    """logaddexp of -inf: no NaN, and the mass arrives where there is any."""
    vocabulary = make(6, 7)
    logits = torch.zeros(3, 8)
    logits[0, 7] = logits[1, 6] = logits[2, 6] = logits[2, 7] = -math.inf
    out = canonicalize(logits, vocabulary, "teacher")
    assert out[:, 6].tolist() == [0, 0, -math.inf] and not out.isnan().any()


def test_input_is_not_changed_and_shapes_are_kept():
    vocabulary = make()
    logits = torch.randn(2, 3, 9)
    before = logits.clone()
    assert canonicalize(logits, vocabulary, "teacher").shape == (2, 3, 8)
    assert torch.equal(logits, before)
    assert canonicalize(logits[0, 0].bfloat16(), vocabulary, "student").dtype == torch.bfloat16


def test_gradient_reaches_the_student_and_not_the_masked():
    """Also after a first call in inference mode, as in an engine that shares the process."""
    vocabulary = make(6, 7, size=9, student_rows=11, teacher_rows=9)
    with torch.inference_mode():
        canonicalize(torch.zeros(1, 11), vocabulary, "student")
    logits = torch.randn(2, 11, dtype=torch.float64, requires_grad=True)
    canonicalize(logits, vocabulary, "student").log_softmax(-1)[:, 0].sum().backward()
    p = torch.where(torch.arange(9) == 7, 0.0, logits.detach()[:, :9].exp())
    expected = -p / p.sum(-1, keepdim=True)
    expected[:, 0] += 1
    torch.testing.assert_close(logits.grad[:, :9], expected)
    assert not logits.grad[:, 9:].any()
    teacher = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: canonicalize(x, vocabulary, "teacher")[:, :7], teacher)


def test_masked_ids_and_marker():
    assert make(6, 7).masked == (7,) and make(6, 7).marker == 7  # the duplicate EOS
    assert make(6, 6, spare_ids=[6, 3, 0]).masked == (3,)  # the first spare id that is no EOS
    holes = share_vocabulary(
        ids(8, {2, 4}), ids(8, {2, 4}), student_eos=6, teacher_eos=6, student_rows=8, teacher_rows=8
    )
    assert holes.size == 8 and holes.masked == (2, 4) and holes.marker == 2  # ids without a token
    with pytest.raises(ValueError, match="add a pad token"):
        choose_marker(6, 6, spare_ids=[6])


def test_different_maps_name_the_first_five():
    teacher = ids(20)
    for i in (3, 5, 7, 9, 11, 13):
        del teacher[f"t{i}"]
        teacher[f"T{i}"] = i
    teacher["t1"], teacher["t2"] = 2, 1
    with pytest.raises(ValueError, match="14 tokens differ") as error:
        share_vocabulary(ids(20), teacher, student_eos=0, teacher_eos=0, student_rows=20, teacher_rows=20)
    message = str(error.value)
    assert "'t1' (student 1, teacher 2)" in message and "'T3' (student none, teacher 3)" in message
    assert message.count("(student") == 5 and "t13" not in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"student_rows": 7}, "student model has 7 output rows, but its tokenizer has 8"),
        ({"teacher_rows": 3}, "teacher model has 3 output rows"),
        ({"teacher_eos": 8}, "teacher's EOS is id 8"),
        ({"student_eos": -1}, "student's EOS is id -1"),
    ],
)
def test_models_that_do_not_fit_their_tokenizer(change, words):
    with pytest.raises(ValueError, match=words):
        make(**change)


def test_an_inconsistent_vocabulary_cannot_be_made():
    for fields in (
        (8, 6, 7, (), 7),
        (8, 6, 6, (6,), 6),
        (8, 6, 7, (3,), 3),
        (8, 6, 6, (9,), 9),
        (8, 9, 9, (1,), 1),
    ):
        with pytest.raises(ValueError):
            SharedVocabulary(*fields)


def test_wrong_logits_or_role():
    with pytest.raises(ValueError, match="7 logits"):
        canonicalize(torch.zeros(2, 7), make(), "student")
    with pytest.raises(ValueError, match="role"):
        canonicalize(torch.zeros(2, 8), make(), "pupil")


def tokenizer(vocabulary, **special):
    """A real Hugging Face tokenizer of these words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(dict(vocabulary), unk_token=next(iter(vocabulary))))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_from_hugging_face_tokenizers():
    words = {"a": 0, "b": 1, "<end>": 2, "<turn>": 3, "<pad>": 4}
    base = tokenizer(words, eos_token="<end>", pad_token="<pad>")
    instruct = tokenizer(words, eos_token="<turn>", pad_token="<pad>")
    rows = {"student_rows": 8, "teacher_rows": 5}
    assert from_tokenizers(base, instruct, **rows) == SharedVocabulary(5, 2, 3, (3,), 3)
    assert from_tokenizers(instruct, base, **rows) == SharedVocabulary(5, 3, 2, (2,), 2)
    assert from_tokenizers(base, base, **rows) == SharedVocabulary(5, 2, 2, (4,), 4)
    assert from_tokenizers(base, base, **rows, student_eos=3, teacher_eos=3).student_eos == 3
    with pytest.raises(ValueError, match="student's tokenizer has no EOS"):
        from_tokenizers(tokenizer(words), instruct, **rows)
    other = tokenizer(words | {"c": 5}, eos_token="<end>")
    with pytest.raises(ValueError, match=r"'c' \(student none, teacher 5\)"):
        from_tokenizers(base, other, **rows)
