"""Embedding bags whose table is a tensor train of two to four cores.

A table of N rows is never stored: a lookup multiplies one small slice of each core (`tt_shapes` has the
formula, `tt_kernels` the arithmetic, `tt_tables` optimizer and cache). Each distinct id of a batch is
contracted once and ids that begin alike share their first products; pooling is torch's own, so every
convention of `nn.EmbeddingBag` holds.

**B** bags, **T** tables, **N** rows of a table, **D** embedding_dim, **L** lookups in the batch.
"""

from collections.abc import Sequence
from typing import Any, Self, Unpack

import torch
from torch import Tensor

from slipstream.embedding.tt.shapes import tt_svd
from slipstream.embedding.tt.tables import TTOptions, TTTables


class TTEmbeddingBag(TTTables):
    """Sum, mean or maximum of rows of a table that is stored as a tensor train: `nn.EmbeddingBag`, smaller.

    **Training.** With `sparse=True` the backward pass ends with an update of the core slices that were looked
    up, and only those: their gradients are summed over the whole pass first (a module may be used several
    times in one graph), always in the same order. The cores get no `.grad` then, so an optimizer of yours
    leaves them alone. With `sparse=False` the cores get ordinary dense gradients.

    **Cache.** `use_cache` counts ids in every forward pass; `cache_populate` then keeps the most used rows
    decompressed. A tensor train cannot take up a change of one row exactly, so two sound schemes exist:

    * `cache_gradient="cores"` (default): cached rows are copies. The gradient goes to the cores, and a
      copy whose core slices changed is recomputed when it is next read. The model is that of a module
      without a cache, whatever the order of steps, populate and reset, up to rounding. Training needs the
      partial products anyway, so only passes without gradients (evaluation, serving) read the cache.
    * `cache_gradient="rows"` (as in TT-Rec): cached rows are dense rows of their own, trained alone; the
      cores learn from the others. Faster in training, but another model than the uncached one, and rows
      that leave the cache lose what they learnt there: see `cache_populate`.

    Args:
        num_embeddings: Rows of the table, N >= 1.
        embedding_dim: Columns of the table, D >= 1, of any size.
        tt_ranks: Inner ranks, one fewer than cores: 1 to 3 integers >= 1.
        tt_p_shapes: Row factors, one a core, product >= N; None for balanced ones.
        tt_q_shapes: Column factors, one a core, product == D; None for balanced ones.
        padding_idx: Row that no bag counts; None for none.
        include_last_offset: Whether offsets end with the number of lookups.
        optimizer: What `sparse=True` applies to the slices of cores that a batch uses and to the rows of a cache
            that has rows of its own, by its name in `slipstream.embedding.rules.OPTIMIZERS`; "sgd" unless given.
            Cores have no rows and take the element-wise rule: "adagrad" for "rowwise_adagrad".
        learning_rate: Of the fused optimizer, 0.1.
        eps: Of the optimizer, 1e-10.
        sparse: Whether to update inside the backward pass; True.
        use_cache: Whether to count ids and to have a cache; False.
        cache_size: Rows the cache holds; 0 for a tenth of the table.
        hashtbl_size: Ids whose counts are kept, >= cache_size (see `IdCounter`); 0 counts exactly, in memory
            that grows with the distinct ids seen.
        cache_gradient: Where gradients of cached rows go, see above; "cores".
        weight_dist: "uniform", "normal", "approx-uniform" or, unless given, "approx-normal"; see `entry_variance`.
        mode: "sum" (unless given), "mean" or "max"; "max" on a GPU leaves the order of torch's own backward to torch.
        dtype: Of the cores; None for torch's default.
        device: Of the cores; None for torch's default.
        generator: Source of randomness on the CPU; None for torch's own. The same draw on every device.

    Attributes:
        tt_cores: Core k has shape (1, p_k, r_{k-1}, q_k, r_k).

    Raises:
        ValueError: A shape does not fit or a choice is unknown.

    Example:
        >>> bag = TTEmbeddingBag(1000, 12, [4, 4], generator=torch.Generator().manual_seed(0))
        >>> bag(torch.tensor([1, 2, 4, 5, 4, 3]), torch.tensor([0, 2])).shape
        torch.Size([2, 12])

    Source: TT-Rec (Yin et al., MLSys 2021) and its FBTT-Embedding, whose constructor this follows. Differs:
    CPU, any D, mean and max, weights, padding, ids and prefixes contracted once, updates of touched slices
    only, bit-for-bit repeatable sums, a cache that stays true.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        tt_ranks: Sequence[int],
        tt_p_shapes: Sequence[int] | None = None,
        tt_q_shapes: Sequence[int] | None = None,
        *,
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        **options: Unpack[TTOptions],
    ) -> None:
        super().__init__(1, num_embeddings, embedding_dim, tt_ranks, tt_p_shapes, tt_q_shapes, **options)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"expected padding_idx in {-num_embeddings}..{num_embeddings - 1}, found "
                f"{padding_idx}: name a row of the table, or None"
            )
        self.padding_idx = padding_idx % num_embeddings if padding_idx is not None else None
        self.include_last_offset = include_last_offset

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        tt_ranks: Sequence[int],
        tt_p_shapes: Sequence[int] | None = None,
        tt_q_shapes: Sequence[int] | None = None,
        **options: Any,
    ) -> Self:
        """Compress a dense table, for example one trained before.

        Args:
            weight: The table, shape (N, D), finite; its dtype and device are taken over unless `options` say
                other.
            tt_ranks: As in the constructor. Full ranks reproduce the table up to rounding.
            tt_p_shapes: As in the constructor.
            tt_q_shapes: As in the constructor.
            **options: Other arguments of the constructor.

        Returns:
            A new module.

        Raises:
            ValueError: The weight is not a finite matrix, or a shape does not fit.
        """
        if weight.dim() != 2:
            raise ValueError(f"expected a weight of shape (N, D), found {tuple(weight.shape)}: pass one table")
        options = {"dtype": weight.dtype, "device": weight.device, **options}
        bag = cls(weight.shape[0], weight.shape[1], tt_ranks, tt_p_shapes, tt_q_shapes, **options)
        cut = tt_svd(weight, bag.tt_p_shapes, bag.tt_q_shapes, bag.tt_ranks)
        with torch.no_grad():
            for core, value in zip(bag.tt_cores, cut, strict=True):
                core.copy_(value)
        return bag

    def forward(
        self,
        input: Tensor,  # noqa: A002 (its name in nn.EmbeddingBag)
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Look up bags of rows and pool them.

        Args:
            input: Rows, int64 or int32: all bags one after another, shape (L,), with `offsets`; or bags of
                one size, shape (B, L / B), without.
            offsets: Where each bag starts, shape (B,), or (B + 1,) with `include_last_offset`; int64 or
                int32.
            per_sample_weights: Factor of each lookup, shape of `input`, only with mode "sum". Differentiable.

        Returns:
            Pooled rows, shape (B, D); 0 for an empty bag.

        Raises:
            ValueError: Shapes or dtypes do not fit, or offsets are not monotone.
            IndexError: A row lies outside the table.
        """
        self._check_rows(input)
        if input.dim() == 1 and offsets is not None:
            _check_offsets(offsets, input.numel(), self.include_last_offset)
            offsets = offsets.long()
        elif input.dim() != 2 or offsets is not None:
            raise ValueError(
                f"expected 1-D input with offsets or 2-D input without, found {input.dim()}-D input "
                f"{'without' if offsets is None else 'with'} offsets: pass one of the two"
            )
        if per_sample_weights is not None:
            _check_weights(per_sample_weights, input, self.mode)
            per_sample_weights = per_sample_weights.to(self.tt_cores[0].dtype)
        last_offset = self.include_last_offset and offsets is not None
        return self._pool(input.long(), offsets, per_sample_weights, last_offset, self.padding_idx)

    def update_cache(self, indices: Tensor) -> None:
        """Count rows without looking them up, as a forward pass over them would.

        Args:
            indices: Rows, any shape, int64 or int32.

        Raises:
            ValueError: The module was built without a cache.
            IndexError: A row lies outside the table.
        """
        if self.counter is None:
            raise ValueError("expected a module with a cache, found use_cache=False: pass use_cache=True")
        self._check_rows(indices)
        self.counter.add(*torch.unique(indices.long(), return_counts=True))

    def full_weight(self) -> Tensor:
        """Give the whole table as the module would read it, shape (N, D), differentiable."""
        return self._dense_tables()[0]


class BatchedTTEmbeddingBags(TTTables):
    """Several tables of one shape, looked up together: every product of all tables in the same batched calls.

    Args:
        num_tables: How many tables, T >= 1.
        num_embeddings: Rows of each table.
        embedding_dim: Columns of each table.
        tt_ranks: Inner ranks of each table.
        tt_p_shapes: Row factors of each table.
        tt_q_shapes: Column factors of each table.
        **options: As for `TTEmbeddingBag`, from `optimizer` on; one cache serves all tables.

    Attributes:
        tt_cores: Core k has shape (T, p_k, r_{k-1}, q_k, r_k).

    Source: FBTT-Embedding, `TableBatchedTTEmbeddingBag`; differs in that several tables may have a cache.
    """

    def forward(self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        """Look up and pool bags of all tables.

        Args:
            indices: Rows, shape (L,), int64 or int32: all bags of the first table, then those of the next.
            offsets: Where each bag starts, with the end of the last, shape (T · B + 1,), int64 or int32.
            per_sample_weights: Factor of each lookup, shape (L,), only with mode "sum".

        Returns:
            Pooled rows, shape (T, B, D).

        Raises:
            ValueError: Shapes or dtypes do not fit, or offsets are not monotone.
            IndexError: A row lies outside its table.
        """
        self._check_rows(indices)
        if indices.dim() != 1 or (offsets.numel() - 1) % self.num_tables:
            raise ValueError(
                f"expected 1-D indices and {self.num_tables} x bags + 1 offsets, found {indices.dim()}-D "
                f"indices and {offsets.numel()} offsets: give every table as many bags, then the last end"
            )
        _check_offsets(offsets, indices.numel(), True)
        if per_sample_weights is not None:
            _check_weights(per_sample_weights, indices, self.mode)
            per_sample_weights = per_sample_weights.to(self.tt_cores[0].dtype)
        num_bags = (offsets.numel() - 1) // self.num_tables
        offsets = offsets.long()
        per_table = offsets[:: max(num_bags, 1)][: self.num_tables + 1].diff()
        first_ids = torch.arange(self.num_tables, device=indices.device) * self._table_size
        ids = indices.long()
        if num_bags:
            ids = ids + torch.repeat_interleave(first_ids, per_table)
        pooled = self._pool(ids, offsets, per_sample_weights, True, None)
        return pooled.view(self.num_tables, num_bags, self.embedding_dim)

    def full_weight(self) -> Tensor:
        """Give all tables as the module would read them, shape (T, N, D), differentiable."""
        return self._dense_tables()


def _check_weights(weights: Tensor, indices: Tensor, mode: str) -> None:
    if mode != "sum" or weights.shape != indices.shape:
        raise ValueError(
            f'expected per_sample_weights of shape {tuple(indices.shape)} and mode "sum", found shape '
            f"{tuple(weights.shape)} and mode {mode!r}: give each lookup a weight, or none"
        )


def _check_offsets(offsets: Tensor, num_lookups: int, include_last_offset: bool) -> None:
    if offsets.dim() != 1 or offsets.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"expected 1-D int64 or int32 offsets, found {offsets.dim()}-D {offsets.dtype}: pass where each bag starts"
        )
    if offsets.numel() == 0:
        if include_last_offset:
            raise ValueError("expected at least one offset, found none: pass the end of the last bag, 0 without bags")
        return
    steps_back = bool((offsets.diff() < 0).any())
    first, last = int(offsets[0]), int(offsets[-1])
    if steps_back or first != 0 or last > num_lookups or (include_last_offset and last != num_lookups):
        ending = f"ending at {num_lookups}" if include_last_offset else f"ending at {num_lookups} or below"
        raise ValueError(
            f"expected offsets that start at 0 and never fall, {ending}, found {first} to {last}"
            f"{', falling in between' if steps_back else ''}: pass the running sum of the bag sizes"
        )
