"Configurations: fields, their order in saved runs, presets, and what the losses are called."
import subprocess
import sys

import pytest

from nioodd.core.errors import NiooddError
from nioodd.core.options import differences, field_docs, from_dict, settings, to_dict, with_values
from nioodd.inversion.config import PRESETS, Config, preset, stored_config
from nioodd.inversion.invert import LOSSES, loss_weights

FIELDS = """id_set ood_sets ood_split train_images size channels eval_images validation_sets validation_images
dropout batch_size lr weight_decay schedule average shift class_weights precision
noise noise_images fresh_noise pretrain_epochs rounds epochs_per_round inversion
conditioning latent_dim generator_steps generator_batch generator_lr generator_beta1 generator_restart
alpha beta gamma delta kl_direction normalise_features losses frozen_mode temperature hard wanted mixtures
samples draw_mode exclude collapse_guard pixel_images pixel_steps pixel_lr select trust_steps seed""".split()


def test_saved_runs_have_these_fields_in_this_order():
    assert list(to_dict(Config())) == FIELDS == [name for name, _, _ in field_docs(Config())]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json_and_texts(name):
    c = preset(name)
    assert from_dict(Config, to_dict(c)) == c == with_values(Config(), settings(c, Config()))


def test_every_field_has_a_plain_sentence():
    for name, _, doc in field_docs(Config()): assert doc and "step size" not in doc, name


def test_experiments_differ_as_in_the_paper():
    assert differences(preset("exp1"), preset("exp2")) == ["rounds: 10 → 20"]
    changed = [d.partition(":")[0] for d in differences(preset("exp1"), preset("exp4"))]
    assert changed == ["rounds", "alpha", "beta", "delta"]


def test_the_letters_of_the_paper_are_the_losses_by_name():
    assert Config().loss_weights == loss_weights()
    assert Config(alpha=1.0, delta=2.0).loss_weights == dict(kl=1, ce=500, cosine=6000, ortho=2)
    assert Config(hard=True).loss_weights == dict(kl=0, ce=500, cosine=6000, ortho=0)
    c = Config(kl_direction="reverse", normalise_features=False)
    assert c.loss_options == dict(kl=dict(direction="reverse"), ortho=dict(normalise=False))
    assert c.loss_options.keys() <= LOSSES.keys()


def test_other_losses_count_and_older_runs_have_none():
    c = with_values(Config(), ["losses=smoothness:100,dark:0.5", "hard=yes"])
    assert c.loss_weights == Config(hard=True).loss_weights | dict(smoothness=100, dark=0.5)
    assert stored_config(to_dict(c)) == c
    older = to_dict(Config())
    del older["losses"]
    assert stored_config(older) == Config()
    with pytest.raises(NiooddError, match="the stored options are a NoneType"): stored_config(None)


@pytest.mark.parametrize("wrong, message", [
    (dict(losses=("dark",)), "losses has 'dark'; expected NAME:WEIGHT"),
    (dict(losses=("dark:much",)), "losses has 'dark:much'"), (dict(losses=("kl:3",)), "--set alpha=3"),
    (dict(batch_size=1), "batch_size is 1"), (dict(rounds=2.5), "rounds is 2.5; expected int"),
    (dict(conditioning="vektor"), "conditioning is 'vektor'"), (dict(lr=float("nan")), "lr is nan"),
    (dict(inversion=1), "inversion is 1; expected bool"), (dict(select="validation"), "validation_images is 0"),
    (dict(validation_images=9, ood_sets=("photos",)), "photos: in validation_sets and in ood_sets")])
def test_mistakes_are_one_line(wrong, message):
    with pytest.raises(NiooddError, match=message) as e: Config(**wrong)
    assert "\n" not in str(e.value)


def test_an_unknown_preset_gets_the_nearest_names():
    with pytest.raises(NiooddError, match="unknown preset 'bst'; did you mean 'best'"): preset("bst")


def test_presets_are_listed_without_torch():
    code = "import sys, nioodd.inversion.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
