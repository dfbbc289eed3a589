"""Low-rank matrices: sums of them kept as factors, and the best approximation of a given rank.

    D = sum_i c_i B_i A_i = [c_1 B_1 | c_2 B_2 | ...] [A_1; A_2; ...]               nothing is lost, ranks add up

    B = Q_B R_B,  A^T = Q_A R_A,  R_B R_A^T = U S V^T                               r x r, whatever the size of D
    D_N = (Q_B U_N sqrt(S_N)) (sqrt(S_N) V_N^T Q_A^T),  |D - D_N|^2 = sum_{i > N} s_i^2     (Eckart, Young 1936)

A dense D is projected on the range of (D D^T)^q D X first, for random X of a few columns more than the rank asked for
(Halko, Martinsson, Tropp 2011, algorithm 4.4); its error is that of D - B A, for |D|^2 - |P D|^2 would cancel in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

OVERSAMPLING = 16
"""Columns of X beyond the rank asked for."""
POWER_ITERATIONS = 3
"""q; the error is then within 1 % of the smallest possible, for spectra with and without a gap (see the tests)."""
DIRECT_SIZE = 256
"""Up to this number of rows or columns, a dense matrix is decomposed as it is."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """`up @ down`."""

    up: torch.Tensor
    """(rows, r)"""
    down: torch.Tensor
    """(r, columns)"""

    @property
    def rank(self) -> int:
        """The common size of both factors."""
        return self.down.shape[0]

    def dense(self) -> torch.Tensor:
        """The product, (rows, columns), in fp32 at least."""
        dtype = torch.promote_types(self.up.dtype, torch.float32)
        return self.up.to(dtype) @ self.down.to(dtype)


@dataclass(frozen=True, slots=True)
class Approximation:
    """A low-rank matrix in place of another."""

    matrix: LowRank
    norm: float
    """Of what it stands for."""
    error: float
    """Frobenius norm of the difference, relative to `norm`."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a factor B, and where in the sum they are."""

    first: int
    up: torch.Tensor
    """(rows, r)"""


def concatenated(terms: Sequence[tuple[Sequence[Rows], torch.Tensor]], rows: int) -> LowRank:
    """The sum of products of which each changes some of `rows` rows; a term is its pieces of B, and A `(r, columns)`.

    The dtype is the widest of all factors.
    """
    downs = [down for _, down in terms]
    dtype = downs[0].dtype
    for factor in (*downs, *(piece.up for pieces, _ in terms for piece in pieces)):
        dtype = torch.promote_types(dtype, factor.dtype)
    up = torch.zeros(rows, sum(len(down) for down in downs), dtype=dtype)
    at = 0
    for pieces, down in terms:
        for piece in pieces:
            up[piece.first : piece.first + len(piece.up), at : at + len(down)] = piece.up.to(dtype)
        at += len(down)
    return LowRank(up, torch.cat([down.to(dtype) for down in downs]))


def compressed(matrix: LowRank, rank: int, energy: float = 1.0) -> Approximation:
    """The best approximation of at most `rank`, of no more than reaches the share `energy` of the squared norm.

    Factors are float32; both have the same singular values, so that neither is rounded worse than the other.
    """
    q_up, r_up = torch.linalg.qr(matrix.up.double())
    q_down, r_down = torch.linalg.qr(matrix.down.double().T)
    u, s, vt = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return _kept(q_up @ u, s, vt @ q_down.T, float(s.square().sum()), rank, energy)


def approximated(dense: torch.Tensor, rank: int, energy: float = 1.0, seed: int = 0) -> Approximation:
    """The same for a dense matrix `(rows, columns)`, in its dtype; larger ones by random projection.

    Its error is exact to fp32's rounding whatever the projection found; the same seed gives the same result.
    """
    total = float(torch.linalg.vector_norm(dense, dtype=torch.float64)) ** 2
    width = rank + OVERSAMPLING
    if min(dense.shape) <= max(DIRECT_SIZE, width):
        u, s, vt = torch.linalg.svd(dense.double(), full_matrices=False)
        return _kept(u, s, vt, total, rank, energy)
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(dense.shape[1], width, generator=generator).to(dense)
    q = torch.linalg.qr(dense @ columns).Q
    for _ in range(POWER_ITERATIONS):
        q = torch.linalg.qr(dense @ torch.linalg.qr(dense.T @ q).Q).Q
    u, s, vt = torch.linalg.svd((q.T @ dense).double(), full_matrices=False)
    found = _kept(q.double() @ u, s, vt, total, rank, energy)
    lost = float(torch.linalg.vector_norm(dense - found.matrix.dense(), dtype=torch.float64))
    return replace(found, error=lost / found.norm if found.norm else 0.0)


def _kept(u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor, total: float, rank: int, energy: float) -> Approximation:
    """The largest singular values that are asked for; `total` is the squared norm of what is approximated."""
    squares = s.square()
    nonzero = int((s > s[:1] * torch.finfo(torch.float32).eps).sum()) if len(s) else 0
    reached = int((squares.cumsum(0) < energy * total).sum()) + 1 if energy < 1 else len(s)
    count = max(1, min(rank, reached, nonzero))
    root = s[:count].sqrt()
    pair = LowRank((u[:, :count] * root).float(), (root[:, None] * vt[:count]).float())
    lost = max(0.0, total - float(squares[:count].sum()))
    return Approximation(pair, math.sqrt(total), math.sqrt(lost / total) if total else 0.0)
