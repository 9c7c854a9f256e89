#pragma once

#include <pybind11/pybind11.h>

namespace bark_fast {

// Adds PagePool and PoolStats to the module.
void bind_page_pool(pybind11::module_& m);

}  // namespace bark_fast
