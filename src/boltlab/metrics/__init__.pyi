from boltlab.metrics.means import EpochMeans as EpochMeans
from boltlab.metrics.means import MeanLoss as MeanLoss
from boltlab.metrics.steps import counted as counted
from boltlab.metrics.steps import log_step as log_step
from boltlab.metrics.steps import share as share
