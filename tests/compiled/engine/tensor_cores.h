// What Hopper's and Blackwell's tensor cores share: tensor_cores.cpp has it, tensor_memory.cpp uses it too.
#pragma once
#include "machine.h"

enum Type { FLOAT16, BFLOAT16, TFLOAT32, FLOAT64 };

// C (M x N) += A (M x K) B (K x N), row by row; N is a multiple of 8.
void multiply_add(const Machine& machine, const float* A, const float* B, float* C, int M, int N, int K, int block);
int products_of_a_block(const Machine& machine, Type type);

// Elements of a 32-bit register: two of 16 bits or one TF32.
int elements_of(Type type);
float element(u32 word, int k, Type type);

// Element k of row or column mn of the matrix that a descriptor describes; outer_major: mn is the axis that is
// contiguous. What is read is added to `reads`.
float element_in_shared(
    Context& c, u64 descriptor, int mn, int k, Type type, bool outer_major, std::vector<std::pair<u32, u32>>& reads,
    bool& undefined);
