"""Products of rows sorted by expert, and their sums by token.

Shape letters: T tokens, R rows = chosen (token, expert) pairs, sorted by expert, E experts of the
bank held here, O and I a matrix's output and input width, D hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ext.model.packed import Packed
from moe_ext.model.row_plan import Bags, Part


def sum_by_token(rows_RD: Tensor, bags: Bags, weight_R: Tensor | None = None) -> Tensor:
    """(T, D): the (weighted) sum of every token's rows, slot by slot; a gather, so it repeats.

    bf16 rows are added in fp32 and rounded once. A token without rows gets zeros.
    """
    if bags.row.numel() == 0:  # zeros that stay in the graph
        zeros = rows_RD.new_zeros(bags.start.numel(), rows_RD.shape[1])
        return zeros.index_add(0, bags.row, rows_RD)
    if weight_R is not None:
        weight_R = weight_R.to(rows_RD.dtype).index_select(0, bags.row)
    return F.embedding_bag(bags.row, rows_RD, bags.start, mode="sum", per_sample_weights=weight_R)


def multiplies_groups(like: Tensor, num_rows: int, *widths: int) -> bool:
    """Whether the device's grouped GEMM takes rows like these; a loop over experts does all others.

    It multiplies bf16 on NVIDIA GPUs from compute capability 8.0 on, rows of whole 16 bytes.
    """
    if not like.is_cuda or like.dtype != torch.bfloat16 or num_rows == 0:
        return False
    aligned = all(width * like.element_size() % 16 == 0 for width in widths)
    return aligned and torch.cuda.get_device_capability(like.device) >= (8, 0)


def grouped_linear(
    rows: Tensor, weight_EOI: Tensor | Packed, part: Part, out: Tensor | None
) -> Tensor:
    """(R, O): every expert's rows times its own matrix, rows[e] @ weight[e].T."""
    if isinstance(weight_EOI, Packed):
        return weight_EOI.linear(rows, part, out)
    return _grouped_mm(rows, weight_EOI.transpose(1, 2), part, out)


def grouped_linear_backward_input(
    grad: Tensor, weight_EOI: Tensor | Packed, part: Part, out: Tensor | None, add: bool = False
) -> Tensor:
    """(R, I): gradient of `grouped_linear` for its rows, grad[e] @ weight[e]; `add`s it to `out`."""
    if isinstance(weight_EOI, Packed):
        return weight_EOI.linear_backward_input(grad, part, out, add)
    return _grouped_mm(grad, weight_EOI, part, out, add)


def _grouped_mm(
    rows: Tensor, matrix_EIO: Tensor, part: Part, out: Tensor | None, add: bool = False
) -> Tensor:
    """The product, written to `out` where it is given; the device's grouped GEMM brings its own."""
    matrix_EIO = matrix_EIO[part.experts]
    if part.count_list is None:
        return F.grouped_mm(rows, matrix_EIO, offs=part.counts.cumsum(0).to(torch.int32))
    if out is None:
        out = rows.new_empty(rows.shape[0], matrix_EIO.shape[2])
    counts = part.count_list
    for into, mine, matrix in zip(
        out.split(counts), rows.split(counts), matrix_EIO.unbind(0), strict=True
    ):
        if add:
            into.addmm_(mine, matrix)
        else:
            torch.mm(mine, matrix, out=into)
    return out


def grouped_linear_backward_weight(
    grad: Tensor, rows: Tensor, part: Part, out: Tensor | None
) -> Tensor:
    """(E, O, I): gradient of `grouped_linear` for the part's weights; zero for an idle expert.

    `out` has all experts of the bank and the part's are written; a grouped GEMM brings its own.
    """
    if part.count_list is None:
        out = F.grouped_mm(grad.t(), rows, offs=part.counts.cumsum(0).to(torch.int32))
        # some devices leave an idle expert's gradient unwritten
        return out.masked_fill_((part.counts == 0).view(-1, 1, 1), 0)
    assert out is not None
    counts = part.count_list
    for into, mine, x in zip(
        out[part.experts].unbind(0), grad.split(counts), rows.split(counts), strict=True
    ):
        torch.mm(mine.t(), x, out=into)  # without a row: zeros
    return out


def sum_by_expert(rows: Tensor, part: Part, out: Tensor) -> None:
    """Writes the sums of the part's rows, expert by expert, to its entries of `out` (E, O)."""
    counts, device = part.counts, rows.device
    number = torch.arange(len(counts), device=device)
    experts = number.repeat_interleave(counts, output_size=rows.shape[0])
    out[part.experts] = rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, experts, rows)
