"""The configuration: the reference file, and errors that name key, line and the nearest valid name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest

from foldd.core.errors import BadConfig
from foldd.daemon.config import _all_keys, load_config
from foldd.daemon.plan import make_plan, stored_plan
from foldd.daemon.settings import METHOD_TABLES, Fold, Settings

REFERENCE = Path(__file__).parents[2] / "config.toml"


def test_reference_file_is_the_defaults():
    assert load_config(REFERENCE).settings == Settings()


def test_reference_file_shows_every_key():
    import tomllib

    def keys(table, place=()):
        for name, value in table.items():
            yield (*place, name)
            if isinstance(value, dict):
                yield from keys(value, (*place, name))

    shown = set(keys(tomllib.loads(REFERENCE.read_text())))
    inside_arrays = {("bus", "subscribe", "endpoint"), ("bus", "subscribe", "key")}
    assert set(_all_keys()) - inside_arrays == shown


def test_every_key_of_the_reference_is_explained_or_obvious():
    lines = [line for line in REFERENCE.read_text().splitlines() if "=" in line and not line.startswith("#")]
    bare = [line.split("=")[0].strip() for line in lines if "#" not in line]
    assert set(bare) <= {"seed", "batch", "learning_rate", "steps", "blur", "chunk_bytes", "max_bundle_bytes",
                         "max_partial_bytes", "data_free_method", "attempts", "scaling"}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["otmf", "otmf-paper", "dare", "lore", "nufilt", "opcm", "score", "task-arithmetic", "ties", "tsv-m", "uowq"],
)
def test_method_tables_are_the_methods_own_fields(name):
    """Settings are typed without torch; here they are held against the dataclasses that do the work."""
    from foldd.daemon.methods import METHODS, make_method

    plan = stored_plan(make_plan(Settings(fold=Fold(method=name)), "digest", None))
    method = METHODS[name]
    assert plan.options == {field.name: field.default for field in dataclasses.fields(method)}
    assert make_method(name, plan.options) == method()


def test_every_method_can_be_configured():
    from foldd.daemon.methods import METHODS

    for name, method in METHODS.items():
        assert msgspec.convert({"method": name}, Fold).method == name
        if not method.needs_calibration:
            assert msgspec.convert({"data_free_method": name}, Fold).data_free_method == name
    assert set(METHOD_TABLES.values()) <= set(METHODS)


@pytest.mark.parametrize(
    ("text", "code", "line", "words"),
    [
        ("[intake]\nsetle_seconds = 3\n", "unknown-key", 2, ["intake.setle_seconds", "'settle_seconds'"]),
        ("\n[foldd]\n", "unknown-key", 2, ["foldd", "'fold'"]),
        ("[fold]\nsettle_seconds = 1\n", "unknown-key", 2, ["intake.settle_seconds", "another table"]),
        ("[intake]\n\nsettle_seconds = 'x'\n", "wrong-value", 3, ["intake.settle_seconds", "float", "str"]),
        ("[fold]\nmethod = 'otfm'\n", "wrong-value", 2, ["fold.method", "'otmf'", "average"]),
        ("[fold.otmf-paper]\nalhpa = 1\n", "unknown-key", 2, ["fold.otmf-paper.alhpa", "'alpha'"]),
        ("[fold]\nthreads = -1\n", "wrong-value", 2, ["fold.threads", ">= 0"]),
        ("[bus]\nsubscribe = [{endpont = 'x'}]\n", "unknown-key", 2, ["'endpoint'"]),
        ("[bus]\nidentity = 'nowhere.key'\n", "missing-path", 2, ["bus.identity", "nowhere.key", "keygen"]),
        ("[bus]\nbind = 'tcp://127.0.0.1:99999'\n", "bad-endpoint", 2, ["bus.bind", "99999", "65535"]),
        ("[bus]\nsubscribe = [{endpoint = 'ci:5760'}]\n", "bad-endpoint", 2, ["bus.subscribe", "tcp://ci:5760"]),
        ("[quantize]\neffort = 'slow'\n", "wrong-value", 2, ["quantize.effort", "Valid: fast, paper, a number."]),
        ("[fold]\ndata_free_method = 'otmf'\n", "wrong-value", 2, ["needs calibration inputs", "one of average, dare"]),
        ("[fold]\ndata_free_method = 'avrage'\n", "wrong-value", 2, ["Did you mean 'average'?"]),
        ("[retention]\ngenerations = 1\n", "wrong-value", 2, ["retention.generations", ">= 2"]),
        ("fold.method = 3\n", "wrong-value", 1, ["fold.method"]),
        ("[heads]\nweighting = 'uoqw'\n", "wrong-value", 2, ["heads.weighting", "'uowq'"]),
        ("[heads]\nweighting = 'uowq'\n", "unsupported-combination", 2, ['heads.mode = "aligned"', '"tuned"']),
        (
            "[heads]\nmode = 'frozen'\nweighting = 'uowq'\n",
            "unsupported-combination",
            3,
            ["heads.weighting", '"frozen"', '"tuned"'],
        ),
    ],
)
def test_errors_name_the_key_the_line_and_the_nearest_name(tmp_path, text, code, line, words):
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(BadConfig) as caught:
        load_config(path)
    assert caught.value.code == code
    assert f"{path}, line {line}:" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_weights_of_tuning_samples_go_with_tuning(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[heads]\nmode = 'tuned'\nweighting = 'uowq'\n")
    assert load_config(path).settings.heads.weighting == "uowq"


@pytest.mark.parametrize(("text", "code"), [("x = [", "bad-toml"), (None, "no-config")])
def test_unreadable_files(tmp_path, text, code):
    path = tmp_path / "config.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadConfig) as caught:
        load_config(path)
    assert caught.value.code == code
    assert text is not None or f"touch {path}" in caught.value.remedy


def test_digest_follows_what_decides_a_fold_and_nothing_else(tmp_path):
    def digest(text):
        (tmp_path / "config.toml").write_text(text)
        return load_config(tmp_path / "config.toml").digest

    assert digest("") == digest("[log]\nlevel = 'debug'\n[state]\ndirectory = 'elsewhere'\n")
    decisive = ["[fold]\nseed = 1\n", "[gate]\nagreement = 0.5\n", "[quantize]\nformat = 'w4'\n"]
    decisive += ["[quantize]\neffort = 'paper'\n", "[quantize]\nstate = 'quantized'\n", "[heads]\nmode = 'tuned'\n"]
    assert len({digest(""), *(digest(text) for text in decisive)}) == 7


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "config.toml").write_text("[state]\ndirectory = '../var'\n")
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "etc" / "config.toml").root == tmp_path / "var"
