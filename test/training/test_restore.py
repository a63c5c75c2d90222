"""A bundle becomes the checkpoint that it was exported from, number for number, or is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from mose_ros.core.bundle import MANIFEST, Manifest
from mose_ros.modeling.driver import MoseDriver
from mose_ros.training import __main__ as command
from mose_ros.training import restore
from mose_ros.training.fit import Fit
from mose_ros.training.weights import rounded

ONLY_TRAINED = ['semantic_head.weight', 'semantic_head.bias']  # no graph has it


@pytest.fixture(scope='module')
def restored(exported, tmp_path_factory):
    out = tmp_path_factory.mktemp('restored') / 'checkpoint'
    assert restore.restore(exported[1], out) == ONLY_TRAINED
    return out


def test_each_number_comes_back_as_the_bundle_stores_it(exported, restored):
    driver, _, _ = exported
    want, got = rounded(driver).state_dict(), MoseDriver.load(restored).state_dict()
    assert want.keys() == got.keys()
    apart = [name for name in want if not torch.equal(want[name], got[name])]
    assert apart == ONLY_TRAINED
    exact = (
        driver.state_dict()
    )  # what was rounded away is lost, so most weights differ from those before the export
    assert sum(not torch.equal(exact[name], got[name]) for name in exact) > len(exact) / 2


def test_the_scales_and_the_choice_of_views_come_back(exported, restored):
    fit, known = Fit.load(restored), Manifest.load(exported[1])
    assert fit.action_low == known.action_low != fit.action_high
    assert (fit.top_k, fit.history) == (known.top_k, known.history)


def test_what_cannot_be_restored_is_refused_and_nothing_written(exported, tmp_path, capsys):
    _, bundle, _ = exported
    out = tmp_path / 'out'

    def refused(folder, words):
        assert command.main(['restore', str(folder), '--out', str(out)]) == 1
        assert words in capsys.readouterr().err and not out.exists()

    half = tmp_path / 'half'
    shutil.copytree(bundle, half)
    replace(Manifest.load(half), precision='float16').save(half)
    refused(half, 'computes in float16')

    silent = tmp_path / 'silent'
    shutil.copytree(bundle, silent)
    replace(Manifest.load(silent), training={}).save(silent)
    refused(silent, 'does not say')

    other = tmp_path / 'other'  # it says of itself that its view router is wider than its graphs
    shutil.copytree(bundle, other)
    said = json.loads((other / MANIFEST).read_text())['training']
    said['model']['glance']['hidden'] += 8
    replace(Manifest.load(other), training=said).save(other)
    refused(other, 'is not where this version exports it')

    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('all of it')
    assert command.main(['restore', str(bundle), '--out', str(tmp_path / 'mine')]) == 1
    assert (tmp_path / 'mine' / 'thesis.txt').exists()
    assert command.main(['restore', str(bundle)]) == 1
