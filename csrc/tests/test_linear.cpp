// Linear layers and attention against their definition in double, operands in blocks of exactly their size for the sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../flash.h"
#include "../gemm.h"
#include "../linear.h"
#include "../parallel.h"
#include "testing.h"

using namespace bark_fast;

namespace {

std::vector<float> draw(int64_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& value : values) value = normal(rng);
    return values;
}

double gelu(double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }

// LayerNorm of one row.
std::vector<double> normalised(const float* x, const std::vector<float>& gain, const std::vector<float>& shift) {
    const int64_t k = static_cast<int64_t>(gain.size());
    double mean = 0, square = 0;
    for (int64_t j = 0; j < k; ++j) mean += x[j] / static_cast<double>(k);
    for (int64_t j = 0; j < k; ++j) square += std::pow(x[j] - mean, 2) / static_cast<double>(k);
    std::vector<double> row(k);
    for (int64_t j = 0; j < k; ++j) row[j] = (x[j] - mean) / std::sqrt(square + 1e-5) * gain[j] + shift[j];
    return row;
}

// A layer of fp32, LayerNorm before it and a bias behind it, whose lines lie one after another.
Linear layer(const std::vector<float>& x, const std::vector<float>& gain, const std::vector<float>& shift,
             const void* weight, const std::vector<float>& bias, std::vector<float>& out, int64_t rows) {
    Linear call{};
    call.dtype = DType::f32;
    call.x = x.data();
    call.x_stride = call.weight_stride = call.k = static_cast<int64_t>(gain.size());
    call.norm_weight = gain.data();
    call.norm_bias = shift.data();
    call.weight = weight;
    call.bias = bias.data();
    call.out = out.data();
    call.out_stride = call.n = static_cast<int64_t>(bias.size());
    call.rows = rows;
    return call;
}

// Two layers, the second of which reads what the first wrote.
void check(int64_t rows, int64_t n, int64_t k, int threads) {
    const auto x = draw(rows * k), norm = draw(k), shift = draw(k), fc = draw(n * k), bias = draw(n), proj = draw(k * n);
    std::vector<float> hidden(rows * n), out(rows * k);
    Linear first = layer(x, norm, shift, fc.data(), bias, hidden, rows);
    first.gelu = true;
    Linear second{};
    second.dtype = DType::f32;
    second.x = hidden.data();
    second.x_stride = second.weight_stride = second.k = n;
    second.weight = proj.data();
    second.residual = x.data();
    second.residual_stride = second.out_stride = second.n = k;
    second.out = out.data();
    second.rows = rows;
    const Linear calls[] = {first, second};
    if (rows > kMostLinearRows) {
        cpu::gemm(first, threads);
        cpu::gemm(second, threads);
    } else {
        cpu::linear_chain(calls, 2, threads);
    }
    for (int64_t r = 0; r < rows; ++r) {
        const auto normed = normalised(x.data() + r * k, norm, shift);
        for (int64_t i = 0; i < n; ++i) {
            double sum = bias[i], size = std::fabs(sum);
            for (int64_t j = 0; j < k; ++j) {
                sum += normed[j] * fc[i * k + j];
                size += std::fabs(normed[j] * fc[i * k + j]);
            }
            expect(std::fabs(hidden[r * n + i] - gelu(sum)) <= 2e-6 * (1 + size), "LayerNorm, product, bias, GELU");
        }
        for (int64_t i = 0; i < k; ++i) {
            double sum = x[r * k + i], size = std::fabs(sum);
            for (int64_t j = 0; j < n; ++j) {
                sum += double{hidden[r * n + j]} * proj[i * n + j];
                size += std::fabs(double{hidden[r * n + j]} * proj[i * n + j]);
            }
            expect(std::fabs(out[r * k + i] - sum) <= 1e-6 * (1 + size), "product and residual");
        }
    }
}

// Weights in int8, each line of them with a scale.
void check_bytes(int64_t rows, int64_t n, int64_t k, int threads) {
    const auto x = draw(rows * k), norm = draw(k), shift = draw(k), bias = draw(n), scales = draw(n);
    std::vector<int8_t> weight(n * k);
    for (int8_t& one : weight) one = static_cast<int8_t>(static_cast<int>(rng() % 255) - 127);
    std::vector<float> out(rows * n);
    Linear call = layer(x, norm, shift, weight.data(), bias, out, rows);
    call.scales = scales.data();
    cpu::linear_chain(&call, 1, threads);
    for (int64_t r = 0; r < rows; ++r) {
        const auto normed = normalised(x.data() + r * k, norm, shift);
        double most = 0;
        for (const double one : normed) most = std::max(most, std::fabs(one));
        for (int64_t i = 0; i < n; ++i) {
            double sum = 0, size = 0;
            for (int64_t j = 0; j < k; ++j) {
                sum += normed[j] * weight[i * k + j];
                size += std::fabs(normed[j] * weight[i * k + j]) + most / 32767 * std::abs(int{weight[i * k + j]});
            }
            expect(std::fabs(out[r * n + i] - (sum * scales[i] + bias[i])) <= 1e-4 * (1 + size * std::fabs(scales[i])),
                   "product of int8");
        }
    }
}

void check_flash(int64_t rows, int64_t keys, int64_t head_dim, bool causal, int threads) {
    const int64_t batch = 2, heads = 3, all = batch * heads;
    const auto query = draw(all * rows * head_dim), key = draw(all * keys * head_dim), value = draw(all * keys * head_dim);
    std::vector<float> out(all * rows * head_dim);
    const auto laid = [&](auto* data, int64_t count) {
        return HeadRows<decltype(data)>{data, heads * count * head_dim, count * head_dim, head_dim};
    };
    const auto read = [&](const std::vector<float>& data, int64_t count) {
        const auto rows_of = laid(data.data(), count);
        return HeadRows<const void*>{rows_of.data, rows_of.batch_stride, rows_of.head_stride, rows_of.row_stride};
    };
    const auto written = laid(out.data(), rows);
    cpu::flash({DType::f32, read(query, rows), read(key, keys), read(value, keys),
                {written.data, written.batch_stride, written.head_stride, written.row_stride}, batch, heads, rows, keys,
                head_dim, 0.3f, causal},
               threads);
    std::vector<double> weights(keys), expected(head_dim);
    for (int64_t head = 0; head < all; ++head)
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t seen = causal ? keys - rows + row + 1 : keys;
            double most = -1e30, sum = 0;
            for (int64_t j = 0; j < seen; ++j) {
                weights[j] = 0;
                for (int64_t d = 0; d < head_dim; ++d)
                    weights[j] += 0.3 * query[(head * rows + row) * head_dim + d] * key[(head * keys + j) * head_dim + d];
                most = std::max(most, weights[j]);
            }
            std::fill(expected.begin(), expected.end(), 0);
            for (int64_t j = 0; j < seen; ++j) {
                sum += weights[j] = std::exp(weights[j] - most);
                for (int64_t d = 0; d < head_dim; ++d) expected[d] += weights[j] * value[(head * keys + j) * head_dim + d];
            }
            for (int64_t d = 0; d < head_dim; ++d)
                expect(std::fabs(out[(head * rows + row) * head_dim + d] - expected[d] / sum) <= 5e-6, "attention");
        }
}

// As bf16, and what these are.
std::vector<uint16_t> rounded(std::vector<float>& values) {
    std::vector<uint16_t> bits(values.size());
    for (size_t i = 0; i < values.size(); ++i) values[i] = of_brain(bits[i] = to_brain(values[i]));
    return bits;
}

std::vector<float> widened(const std::vector<uint16_t>& bits) {
    std::vector<float> values(bits.size());
    for (size_t i = 0; i < bits.size(); ++i) values[i] = of_brain(bits[i]);
    return values;
}

// In bf16 the same as in fp32, but for the last rounding.
void check_brain(int64_t rows, int64_t n, int64_t k, int threads) {
    auto x = draw(rows * k), norm = draw(k), weight = draw(n * k), bias = draw(n), residual = draw(rows * n);
    const auto x_ = rounded(x), norm_ = rounded(norm), weight_ = rounded(weight), bias_ = rounded(bias),
               residual_ = rounded(residual);
    std::vector<float> exact(rows * n);
    std::vector<uint16_t> out(rows * n);
    Linear call{};
    call.x_stride = call.weight_stride = call.k = k;
    call.out_stride = call.residual_stride = call.n = n;
    call.rows = rows;
    const auto run = [&](DType dtype, const auto& x, const auto& norm, const auto& weight, const auto& bias,
                         const auto& residual, auto& out) {
        call.dtype = dtype;
        call.x = x.data();
        call.norm_weight = norm.data();
        call.weight = weight.data();
        call.bias = bias.data();
        call.residual = residual.data();
        call.out = out.data();
        cpu::gemm(call, threads);
    };
    run(DType::f32, x, norm, weight, bias, residual, exact);
    run(DType::bf16, x_, norm_, weight_, bias_, residual_, out);
    const auto got = widened(out);
    for (int64_t i = 0; i < rows * n; ++i)
        expect(std::fabs(got[i] - exact[i]) <= 5e-3 * (0.01 + std::fabs(exact[i])), "product in bf16");
}

void check_brain_flash(int64_t rows, int64_t keys, int64_t head_dim, bool causal, int threads) {
    auto query = draw(rows * head_dim), key = draw(keys * head_dim), value = draw(keys * head_dim);
    const auto query_ = rounded(query), key_ = rounded(key), value_ = rounded(value);
    std::vector<float> exact(rows * head_dim);
    std::vector<uint16_t> out(rows * head_dim);
    const auto run = [&](DType dtype, const auto& query, const auto& key, const auto& value, auto& out) {
        const auto read = [&](const auto& data) { return HeadRows<const void*>{data.data(), 0, 0, head_dim}; };
        cpu::flash({dtype, read(query), read(key), read(value), {out.data(), 0, 0, head_dim}, 1, 1, rows, keys, head_dim,
                    0.3f, causal},
                   threads);
    };
    run(DType::f32, query, key, value, exact);
    run(DType::bf16, query_, key_, value_, out);
    const auto got = widened(out);
    for (int64_t i = 0; i < rows * head_dim; ++i)  // softmax's weights may be rounded as well
        expect(std::fabs(got[i] - exact[i]) <= 0.03, "attention in bf16");
}

}  // namespace

int main() {
    avoid_openmp(true);  // thread sanitizers know nothing of libgomp
    for (const int threads : {1, 2, 5})
        for (int64_t rows = 1; rows <= kMostLinearRows; ++rows)
            for (const auto& [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {7, 33}, {130, 65}, {67, 530}, {300, 96}})
                for (const auto run : {check, check_bytes}) run(rows, n, k, threads);
    for (const int threads : {1, 5}) {
        for (const int64_t rows : {17, 31, 65, 130})
            for (const auto& [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {7, 33}, {130, 65}, {53, 300}}) {
                check(rows, n, k, threads);
                check_brain(rows, n, k, threads);
            }
        for (const auto& [rows, keys] : {std::pair<int64_t, int64_t>{1, 1}, {5, 48}, {17, 49}, {40, 97}})
            for (const int64_t head_dim : {2, 12, 64})
                for (const bool causal : {false, true}) {
                    check_flash(rows, keys, head_dim, causal, threads);
                    check_brain_flash(rows, keys, head_dim, causal, threads);
                }
    }
    std::puts("linear layers and attention agree");
}
