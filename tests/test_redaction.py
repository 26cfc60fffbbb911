"""No secret is left in what a run writes."""

import pytest
from omegaconf import OmegaConf

from verl_trb.redaction import redact_file, redacted, redacted_text, secrets
from verl_trb.run_folder import CONFIG, METRICS, open_run

KEY = "0123456789abcdef"


@pytest.mark.parametrize(
    "name",
    ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "password", "db.secret", "apikey", "api-key", "token"],
)
def test_values_under_secret_names_are_hidden(name):
    tree = {"env_vars": {name: KEY, "OMP_NUM_THREADS": "1"}, "files": [f"a {KEY}"]}
    assert secrets(tree) >= {KEY}
    assert KEY not in str(redacted(tree, secrets(tree)))
    assert redacted(tree)["env_vars"]["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("name", ["tokenizer_path", "draft_tokens", "max_num_batched_tokens", "primary_key", "keys"])
def test_other_names_are_left_alone(name):
    assert redacted({name: "something long"}) == {name: "something long"}
    assert redacted({"a_token": 5, "b_token": None}) == {"a_token": 5, "b_token": None}


def test_passwords_in_urls_are_hidden():
    assert (
        redacted_text("https://me:s3cr3t@host/x and http://host:80/y", ())
        == "https://me:***@host/x and http://host:80/y"
    )


def test_logs_lose_what_the_environment_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", KEY)
    file = tmp_path / "worker.err"
    file.write_bytes(b"\xff binary " + KEY.encode() + b" and more")
    redact_file(file, secrets())
    assert file.read_bytes() == b"\xff binary *** and more"


def test_config_yaml_has_no_secrets_and_still_continues_the_run(tmp_path):
    config = OmegaConf.create(
        {
            "trainer": {"resume_mode": "auto", "total_training_steps": 4},
            "trb": {"run_dir": str(tmp_path), "data": {"url": f"https://u:{KEY}@host"}},
            "ray_kwargs": {"ray_init": {"runtime_env": {"env_vars": {"WANDB_API_KEY": KEY}}}},
        }
    )
    open_run(config)
    assert KEY not in (tmp_path / CONFIG).read_text()
    (tmp_path / METRICS).write_text('{"step": 0}\n')
    open_run(config)  # the secret is no other setting
