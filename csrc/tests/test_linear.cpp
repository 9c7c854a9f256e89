// Linear layers against their definition in double, operands in blocks of exactly their size for the sanitizers.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../linear.h"
#include "../parallel.h"

using namespace bark_fast;

namespace {

std::mt19937_64 rng(0);

std::vector<float> draw(int64_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& value : values) value = normal(rng);
    return values;
}

void expect(bool truth, const char* what) {
    if (truth) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

double gelu(double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }

// Two layers, the second of which reads what the first wrote.
void check(int64_t rows, int64_t n, int64_t k, int threads) {
    const auto x = draw(rows * k), norm = draw(k), shift = draw(k), fc = draw(n * k), bias = draw(n), proj = draw(k * n);
    std::vector<float> hidden(rows * n), out(rows * k);
    Linear first{};
    first.dtype = DType::f32;
    first.x = x.data();
    first.x_stride = first.weight_stride = first.k = k;
    first.norm_weight = norm.data();
    first.norm_bias = shift.data();
    first.weight = fc.data();
    first.bias = bias.data();
    first.out = hidden.data();
    first.out_stride = first.n = n;
    first.rows = rows;
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
    cpu::linear_chain(calls, 2, threads);
    for (int64_t r = 0; r < rows; ++r) {
        double mean = 0, square = 0;
        for (int64_t j = 0; j < k; ++j) mean += x[r * k + j] / static_cast<double>(k);
        for (int64_t j = 0; j < k; ++j) square += std::pow(x[r * k + j] - mean, 2) / static_cast<double>(k);
        for (int64_t i = 0; i < n; ++i) {
            double sum = bias[i], size = std::fabs(sum);
            for (int64_t j = 0; j < k; ++j) {
                const double normed = (x[r * k + j] - mean) / std::sqrt(square + 1e-5) * norm[j] + shift[j];
                sum += normed * fc[i * k + j];
                size += std::fabs(normed * fc[i * k + j]);
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

}  // namespace

int main() {
    avoid_openmp(true);  // thread sanitizers know nothing of libgomp
    for (const int threads : {1, 2, 5})
        for (int64_t rows = 1; rows <= kMostLinearRows; ++rows)
            for (const auto& [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {7, 33}, {130, 65}, {67, 530}, {300, 96}})
                check(rows, n, k, threads);
    std::puts("linear layers agree");
}
