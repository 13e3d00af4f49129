# SPDX-License-Identifier: Apache-2.0
"""Training: data by name, the task, the run and its folder, and the report. Needs ``pip install 'nearsight[train]'``.

recipe.py          what a run is asked to do: one flat set of values, checked, to and from YAML
data/              pictures by name, split in three
task.py            the LightningModule
optimizer.py       the optimiser and the schedule of a recipe
callbacks.py       tables and checkpoints after every epoch, the clock, and how a run is stopped
batchnorm.py       batch norms over several processes
evaluate.py        accuracy and confusion matrix of a model
matching.py        which class of a network a class of the data is
assess.py          a saved model measured on any data
announce.py        what a run says before and after
train.py           the run
report.py          the page that shows it
presets.py         models that belong together
measures.py        what a comparison measures of a run
intervals.py       how far an accuracy, and a difference of two, could be off by luck
compare.py         several models with several seeds
compare_report.py  the tables and the page that show them
"""
