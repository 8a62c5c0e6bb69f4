// The only file that includes pybind11.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "check.h"
#include "inspect.h"
#include "model.h"

namespace py = pybind11;
using namespace halfturn;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// Rows and columns of codes that tiles [in/16, out/16, 8*bits] hold.
std::pair<int64_t, int64_t> tile_sizes(const py::array& tiles, int bits) {
  CHECK(bits >= 2 && bits <= 8, "bits is ", bits, ", expected 2 to 8");
  CHECK(tiles.ndim() == 3 && tiles.shape(2) == 8 * bits, "tiles of ", bits, " bits are [in/16, out/16, ", 8 * bits,
        "], the array has ", tiles.ndim(), " dimensions, the last of ",
        tiles.ndim() ? tiles.shape(tiles.ndim() - 1) : 0);
  return {tiles.shape(0) * kTile, tiles.shape(1) * kTile};
}

Array<uint8_t> unpack_array(const Array<uint32_t>& tiles, int bits) {
  auto [in, out] = tile_sizes(tiles, bits);
  Array<uint8_t> codes({out, in});
  unpack(tiles.data(), in, out, bits, codes.mutable_data());
  return codes;
}

Array<uint32_t> pack_array(const Array<uint8_t>& codes, int bits) {
  CHECK(bits >= 2 && bits <= 8, "bits is ", bits, ", expected 2 to 8");
  CHECK(codes.ndim() == 2 && codes.shape(0) % kTile == 0 && codes.shape(1) % kTile == 0,
        "codes are [out, in] with both a multiple of ", kTile, ", the array has ", codes.ndim(), " dimensions");
  const int64_t out = codes.shape(0), in = codes.shape(1);
  Array<uint32_t> tiles({in / kTile, out / kTile, int64_t(8 * bits)});
  pack(codes.data(), in, out, bits, tiles.mutable_data());
  return tiles;
}

// scales come as float16: numpy's half has no C++ type, so they are read through a view of 16-bit integers.
Array<float> dequantize_array(const Array<uint32_t>& tiles, const py::array& scales, const Array<int8_t>& levels,
                              int bits) {
  auto [in, out] = tile_sizes(tiles, bits);
  CHECK(scales.dtype().kind() == 'f' && scales.itemsize() == 2 && scales.ndim() == 2 && scales.shape(1) == out &&
            scales.shape(0) > 0 && in % (scales.shape(0) * kTile) == 0,
        "scales are float16 [groups, ", out, "] with groups that divide ", in / kTile, " tiles");
  CHECK(levels.size() == 1 << bits, "levels has ", levels.size(), " values, ", bits, " bits have ", 1 << bits);
  Array<uint16_t> halves(py::array(scales).attr("view")("uint16"));
  Array<float> weights({out, in});
  dequantize(tiles.data(), halves.data(), levels.data(), in, out, scales.shape(0), bits, weights.mutable_data());
  return weights;
}

py::object inspect(const std::string& path) {
  std::string json;
  {
    py::gil_scoped_release unlocked;
    json = inspect_json(load_model(path));
  }
  return py::module_::import("json").attr("loads")(json);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Halfturn's compiled engine";
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const Error& error) {
      py::set_error(py::module_::import("halfturn.error").attr("Error"), error.what());
    }
  });
  m.def("inspect", &inspect, py::arg("path"),
        "Validates a checkpoint folder: config, linears, files and bits as a dict.");
  m.def("unpack", &unpack_array, py::arg("codes"), py::arg("bits"),
        "uint32 tiles [in/16, out/16, 8*bits] to uint8 codes [out, in]; sizes are the padded ones.");
  m.def("pack", &pack_array, py::arg("codes"), py::arg("bits"), "The inverse of unpack.");
  m.def("dequantize", &dequantize_array, py::arg("codes"), py::arg("scales"), py::arg("levels"), py::arg("bits"),
        "Tiles, float16 scales [groups, out] and int8 levels [2^bits] to float32 weights [out, in].");
}
