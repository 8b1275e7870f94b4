"""What Anchor DETR has and the library has not: points as queries, row-column attention."""

from .attention import RowColumnEncoderLayer
from .decoder import PointDecoder, PointDecoderLayer, PointTransformer
from .layouts import AnchorDetrLayout
from .queries import CellCentres, PointQueries, PointQueryEmbedding

__all__ = [
    "AnchorDetrLayout",
    "CellCentres",
    "PointDecoder",
    "PointDecoderLayer",
    "PointQueries",
    "PointQueryEmbedding",
    "PointTransformer",
    "RowColumnEncoderLayer",
]
