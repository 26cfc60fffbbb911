"""The student's output layer outside of distillation: the distribution that rollouts are drawn from."""

import torch

from verl_trb.training.head import DistillationHead
from verl_trb.vocabulary import canonicalize, share_vocabulary


def test_plain_logits_give_the_rollouts_log_probabilities():
    """Padding rows, a duplicate EOS: log-probabilities and gradient of the shared vocabulary; a finite entropy."""
    ids = {f"t{i}": i for i in range(9)}
    vocabulary = share_vocabulary(ids, ids, student_eos=3, teacher_eos=7, student_rows=12, teacher_rows=12)
    g = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(5, 12, bias=False)
    head = DistillationHead.from_linear(linear)
    hidden = torch.randn(2, 3, 5, generator=g)
    torch.testing.assert_close(head(hidden), linear(hidden))  # not told of a vocabulary
    head.vocabulary = vocabulary
    logits = head(hidden) / 0.1
    expected = canonicalize(linear(hidden) / 0.1, vocabulary, "student").log_softmax(-1)
    got = logits.log_softmax(-1)
    live = [i for i in range(9) if i not in vocabulary.masked]
    torch.testing.assert_close(got[..., live], expected[..., live])
    assert got[..., [7, 9, 10, 11]].exp().max() == 0
    entropy = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
    assert entropy.isfinite().all()
    (grad,) = torch.autograd.grad(got[..., live].sum(), linear.weight)
    (exact,) = torch.autograd.grad(expected[..., live].sum(), linear.weight)
    torch.testing.assert_close(grad, exact)
