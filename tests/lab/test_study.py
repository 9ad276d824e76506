from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2p_diloco.core.errors import UsageError
from p2p_diloco.lab.experiment import BASES
from p2p_diloco.lab.simulated_run import SimulatedRun
from p2p_diloco.lab.study import Study
from tests.support.small_runs import SMALL

ROOT = Path(__file__).parents[2]
STUDIES = sorted(path for path in (ROOT / "peers/experiments").glob("*.toml") if path.stem not in BASES)
BASE = f"""
name = "small"
[model.config]
model_type = "llama"
[data]
seq_len = {SMALL["data"]["seq_len"]}
[inner]
steps = 4
[simulate]
replicas = 2
"""
HEAD = """
title = "T"
paper = "P"
base = "base.toml"
reference = "plain"
"""
ARMS = """
[[arm]]
name = "plain"
[[arm]]
name = "half"
set = { "simulate.drop" = 0.5, "inner.steps" = 8 }
"""


def write(folder: Path, text: str) -> Path:
    (folder / "base.toml").write_text(BASE)
    (folder / "study.toml").write_text(text)
    return folder / "study.toml"


def test_arms_by_seed_each_with_its_keys(tmp_path: Path) -> None:
    more = 'seeds = [3, 4]\nset = { "inner.steps" = 6 }\n'
    study = Study.load(write(tmp_path, HEAD + more + ARMS), "full")
    assert [(trial.arm, trial.seed) for trial in study.trials] == [("plain", 3), ("half", 3), ("plain", 4), ("half", 4)]
    plain, half = study.trials[0].what, study.trials[1].what
    assert (plain.run.inner.steps, plain.simulate.drop, plain.run.seed) == (6, 0.0, 3)
    assert (half.run.inner.steps, half.simulate.drop, half.simulate.replicas) == (8, 0.5, (2,))
    assert (study.name, study.base) == ("study", tmp_path)


def test_a_size_changes_seeds_and_keys_and_an_arm_has_the_last_word(tmp_path: Path) -> None:
    quick = '[quick]\nseeds = [9]\nset = { "inner.steps" = 5, "inner.batch_size" = 2 }\n'
    path = write(tmp_path, HEAD + ARMS + quick)
    study = Study.load(path, "quick")
    assert [(trial.seed, trial.what.run.inner.steps) for trial in study.trials] == [(9, 5), (9, 8)]
    assert {trial.what.run.inner.batch_size for trial in study.trials} == {2}
    with pytest.raises(UsageError, match=r"study\.toml: has no table \[large\], so no large variant"):
        Study.load(path, "large")


def test_a_size_may_have_a_base_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + ARMS + '[large]\nbase = "large.toml"\n')
    (tmp_path / "large.toml").write_text(BASE.replace("replicas = 2", "replicas = 3"))
    assert {trial.what.simulate.replicas for trial in Study.load(path, "large").trials} == {(3,)}
    assert {trial.what.simulate.replicas for trial in Study.load(path, "full").trials} == {(2,)}


def test_the_same_simulation_has_the_same_key_in_every_study(tmp_path: Path) -> None:
    one = Study.load(write(tmp_path, HEAD + ARMS), "full").trials
    (tmp_path / "other.toml").write_text(
        HEAD.replace('"T"', '"U"').replace("plain", "as is") + '[[arm]]\nname = "as is"\n'
    )
    other = Study.load(tmp_path / "other.toml", "full").trials
    assert other[0].key == one[0].key
    assert len({trial.key for trial in one}) == 6


def test_other_files_or_other_text_in_them_are_another_simulation(tmp_path: Path) -> None:
    """Two folders may have run files that say the same."""
    keys = []
    for name in ("one", "other"):
        (tmp_path / name / "text").mkdir(parents=True)
        (tmp_path / name / "text" / "a.txt").write_text("a")
        path = write(tmp_path / name, HEAD + ARMS)
        base = path.with_name("base.toml")
        base.write_text(BASE.replace("[data]", '[data]\nsource = "path"\npath = "text"'))
        keys.append(Study.load(path, "full").trials[0].key)
    assert keys[0] != keys[1]
    assert Study.load(path, "full").trials[0].key == keys[1]
    (tmp_path / "other" / "text" / "a.txt").write_text("as long")
    assert Study.load(path, "full").trials[0].key not in keys


def test_what_a_link_leads_to_and_what_names_an_end_token_are_of_the_simulation(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("a")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    path = write(tmp_path, HEAD + ARMS)
    keys = '[data]\nsource = "path"\npath = "text"\ntokenizer = "tokenizer.json"'
    path.with_name("base.toml").write_text(BASE.replace("[data]", keys))
    seen = [Study.load(path, "full").trials[0].key]
    (tmp_path / "elsewhere" / "a.txt").write_text("as long")
    seen.append(Study.load(path, "full").trials[0].key)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    seen.append(Study.load(path, "full").trials[0].key)
    assert len(set(seen)) == 3
    assert Study.load(path, "full").trials[0].key == seen[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD, "key 'arm' is missing"),
        (HEAD + "arm = []\n", "key 'arm': value should have at least 1 item"),
        (HEAD + ARMS + '[quick]\nbas = "b.toml"\n', "unknown key 'quick.bas'; did you mean 'base'?"),
        (HEAD + ARMS.replace("half", "plain"), "key 'top level': two arms have the same name"),
        (HEAD.replace("plain", "whole") + ARMS, "key 'top level': there is no arm 'whole'"),
        (HEAD + 'gap = ["plain", "none"]\n' + ARMS, "key 'top level': there is no arm 'none'"),
        (HEAD + "seed = [1]\n" + ARMS, "unknown key 'seed'; did you mean 'seeds'?"),
        (HEAD + "seeds = [-1]\n" + ARMS, "key 'seeds.1': input should be greater than or equal to 0"),
        (
            HEAD + ARMS.replace("simulate.drop", "simulate.drops"),
            "arm 'half': [simulate]: unknown key 'drops'; did you mean 'drop'?",
        ),
        (HEAD + ARMS.replace("inner.steps", "name.steps"), "arm 'half': key 'name.steps': 'name' is not a table"),
        (HEAD + ARMS.replace("simulate.drop", "seed"), "arm 'half': key 'seed' cannot be set; give seeds = [...]"),
        (HEAD + ARMS.replace('"half"', '"a|b"'), "key 'arm.2.name': a name is one line without |"),
        (HEAD + ARMS.replace("0.5", '"half"'), "arm 'half': [simulate]: key 'drop': input should be a valid number"),
        (HEAD + "[[arm]\n", "not valid TOML"),
    ],
)
def test_a_bad_study_names_file_arm_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as refused:
        Study.load(path, "full")
    assert str(refused.value).startswith(f"{path}: {message}"), refused.value


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD.replace("base.toml", "none.toml") + ARMS)
    with pytest.raises(UsageError, match=r"none\.toml: no such run file"):
        Study.load(path, "full")


def test_what_is_wrong_in_the_base_is_no_arms_fault(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + ARMS)
    (tmp_path / "base.toml").write_text(BASE.replace("steps", "step"))
    with pytest.raises(UsageError, match=r"/base\.toml: unknown key 'inner\.step'; did you mean 'steps'"):
        Study.load(path, "full")


def test_a_study_may_set_what_its_base_lacks(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + 'set = { "name" = "small" }\n' + ARMS)
    (tmp_path / "base.toml").write_text(BASE.replace('name = "small"', ""))
    assert {trial.what.run.name for trial in Study.load(path, "full").trials} == {"small"}


def start_of(what: SimulatedRun) -> str:
    """All that ``warm_start`` depends on, beside the seed."""
    data = [what.run.model.model_dump(), what.run.data.model_dump(), what.simulate.warm_steps]
    inner = what.run.inner.model_dump(exclude={"steps", "min_lr_ratio", "grad_accumulation"})
    return json.dumps([*data, inner])


@pytest.mark.parametrize("path", STUDIES, ids=[path.stem for path in STUDIES])
def test_the_repositorys_studies_are_sound(path: Path) -> None:
    """In all sizes, which differ; each opens with a comment on what it asks; and all arms start from the same values,
    but where the start is what is asked about."""
    assert path.read_text().startswith("# ")
    keys: set[str] = set()
    for size in ("full", "quick", "large"):
        trials = Study.load(path, size).trials
        of_size = {trial.key for trial in trials}
        assert len(of_size) == len(trials), "two arms are the same"
        assert not keys & of_size
        keys |= of_size
        starts = {(trial.seed, start_of(trial.what)) for trial in trials}
        assert len(starts) == len({trial.seed for trial in trials}) or path.stem == "pretraining"
    seeds = {trial.seed for trial in Study.load(path, "full").trials}
    assert len(seeds) >= 3
