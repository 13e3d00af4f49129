# SPDX-License-Identifier: Apache-2.0
"""Training: data by name, the task, the run and its folder, and the report. Needs ``pip install 'nearsight[train]'``.

recipe.py     what a run is asked to do: one flat set of values, checked, to and from YAML
files.py      whole files or none: temporary file, fsync, rename
data.py       pictures by name, split in three
weights.py    a trained model and all that is needed to rebuild it, in one safetensors file
task.py       the LightningModule
evaluate.py   accuracy and confusion matrix of a model
matching.py   which class of a network a class of the data is
trained.py    the pictures that a run was trained on, eight bytes of each
assess.py     a saved model measured on any data
train.py      the run
report.py     the page that shows it
"""
