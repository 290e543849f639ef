from boltlab.metrics.means import EpochMeans as EpochMeans
from boltlab.metrics.means import MeanLoss as MeanLoss
