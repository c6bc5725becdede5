"""The styles by which a plan shards a module over the tensor axis: Hugging Face's words, and those of sequences."""

from __future__ import annotations

TENSOR_STYLES = {
    "colwise": "each rank has some output features; the input is whole",
    "colwise_gather_output": "the same, and outputs are gathered (a head's stay sharded under loss_parallel)",
    "colwise_rep": "another name of colwise_gather_output",
    "rowwise": "each rank has some input features; the input is sharded, outputs are summed",
    "rowwise_split_input": "the same for an input that is whole",
    "rowwise_rep": "another name of rowwise_split_input",
    "embedding_rowwise": "each rank has some rows of an embedding; outputs are summed",
    "embedding_colwise": "each rank has some features of an embedding; outputs are gathered",
    "replicated_with_grad_allreduce": "a whole layer on sharded heads (a norm of queries); gradients are summed",
    "sequence_parallel": "a whole layer on a part of the sequence (a norm); gradients are summed",
    "embedding_rowwise_sequence": "embedding_rowwise, its output shared out along the sequence",
    "rowwise_sequence": "rowwise, its output shared out along the sequence",
    "colwise_gather_output_sequence": "colwise_gather_output on an input shared out along the sequence",
    "gather_sequence": "joins the sequence for the sharded layers inside the module",
    "whole_sequence": "joins the sequence for a module that is not sharded, and shares its output out again",
}
"""Every style and what it does."""
