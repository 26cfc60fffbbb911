"""A student with fewer and with more embedding rows than the teacher, in the real engine, after a real weight sync."""

import shutil
from pathlib import Path

import pytest
import torch
from engine import STUDENT, VOCABULARY, engine, make_pair, tiny_model
from test_engine_sync import gaps, sync
from transformers import AutoModelForCausalLM

from verl_trb.rollout.engine_args import blended_engine_args
from verl_trb.rollout.padded_student import fit_rows, with_rows


@pytest.mark.parametrize("student_rows, teacher_rows", [(VOCABULARY, VOCABULARY + 16), (VOCABULARY + 16, VOCABULARY)])
def test_rollouts_with_padded_vocabularies(tmp_path: Path, student_rows: int, teacher_rows: int) -> None:
    torch.set_num_threads(1)
    pair = make_pair(tmp_path)
    whole_teacher = tmp_path / "whole"  # the oracles know no padding: what the rows beyond the tokenizer say is cut
    shutil.copytree(pair.teacher, whole_teacher)
    for folder, rows in ((pair.student, student_rows), (pair.teacher, teacher_rows)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.save_pretrained(folder)
    arguments = blended_engine_args(str(pair.student), 3, 1, student_rows, teacher_rows)
    with engine(pair, draft_tokens=3, speculative_config=arguments["speculative_config"]) as blended:
        trained = tiny_model(7, **STUDENT)
        trained.resize_token_embeddings(student_rows, mean_resizing=False)
        sync(blended, trained, torch.float32)
        student_N, teacher_N = gaps(blended, tiny_model(7, **STUDENT).double(), whole_teacher)
    assert student_N.max() < 1e-4 and teacher_N.max() < 1e-4


def test_folder_is_used_as_it_is_where_rows_agree():
    assert with_rows("/models/student", 151_936, 151_936) == "/models/student"


def test_only_rows_of_the_vocabulary_are_fitted():
    tensor = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(fit_rows("model.embed_tokens.weight", tensor, 2), tensor[:2])
    padded = fit_rows("lm_head.weight", tensor, 5)
    assert torch.equal(padded[:3], tensor) and not padded[3:].any()
    assert fit_rows("model.layers.0.mlp.up_proj.weight", tensor, 5) is tensor
