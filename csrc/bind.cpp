// The only file that includes pybind11: halfturn._C, the compiled engine as Python sees it. The GIL is released in
// every call that computes.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "check.h"
#include "cpu/cpu.h"
#include "engine.h"
#include "inspect.h"
#include "model.h"
#include "pages.h"

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

py::dict cpu_features() {
  py::list names;
  for (Isa isa : available_isas()) names.append(isa_name(isa));
  py::dict features;
  features["isa"] = isa_name(available_isas().back());
  features["available"] = names;
  features["cores"] = usable_cores();
  features["model"] = cpu_name();
  return features;
}

int64_t total_tokens(const std::vector<const Item*>& items, int64_t less) {
  int64_t total = 0;
  for (const Item* item : items) total += std::max<int64_t>(int64_t(item->tokens.size()) - less, 0);
  return total;
}

constexpr const char* kUnderWay = "_under_way";

py::list as_list(std::vector<StepResult>& results) {
  py::list out;
  for (StepResult& r : results) {
    if (!r.error.empty()) out.append(std::move(r.error));
    else if (r.sample) out.append(std::move(*r.sample));
    else out.append(py::none());
  }
  return out;
}

py::list step(Engine& engine, const std::vector<const Item*>& items) {
  std::vector<StepResult> results;
  {
    py::gil_scoped_release unlocked;
    results = engine.step(items);
  }
  return as_list(results);
}

// What is under way must live until it is finished, samplers above all; so the model keeps the items.
void start(const py::object& self, const py::list& items) {
  const auto natives = items.cast<std::vector<const Item*>>();
  Engine& engine = self.cast<Engine&>();
  {
    py::gil_scoped_release unlocked;
    engine.start(natives);
  }
  if (!py::hasattr(self, kUnderWay)) self.attr(kUnderWay) = py::list();
  self.attr(kUnderWay).attr("append")(items);
}

py::list finish(const py::object& self) {
  Engine& engine = self.cast<Engine&>();
  std::vector<StepResult> results;
  py::object items = py::none();
  if (py::hasattr(self, kUnderWay) && py::len(self.attr(kUnderWay)) > 0) items = self.attr(kUnderWay).attr("pop")(0);
  {
    py::gil_scoped_release unlocked;
    results = engine.finish();
  }
  return as_list(results);
}

Array<float> logits(Engine& engine, const std::vector<const Item*>& items) {
  Array<float> out({total_tokens(items, 0), engine.config().vocab});
  float* data = out.mutable_data();
  py::gil_scoped_release unlocked;
  engine.logits(items, data);
  return out;
}

Array<float> nll(Engine& engine, const std::vector<const Item*>& items) {
  Array<float> out(total_tokens(items, 1));
  float* data = out.mutable_data();
  py::gil_scoped_release unlocked;
  engine.nll(items, data);
  return out;
}

py::dict memory(const Engine& engine) {
  py::dict bytes;
  bytes["weights"] = engine.weight_bytes();
  bytes["embedding"] = engine.embed_bytes();
  bytes["kv_cache"] = engine.kv_bytes();
  bytes["workspace"] = engine.workspace_bytes();
  return bytes;
}

void bind_sampler(py::module_& m) {
  py::class_<Sample>(m, "Sample")
      .def_readonly("token", &Sample::token)
      .def_readonly("logprob", &Sample::logprob)
      .def_readonly("top", &Sample::top);
  py::class_<Sampler>(m, "Sampler")
      .def(py::init([](float temperature, int64_t top_k, float top_p, float min_p, float repetition_penalty,
                       float presence_penalty, float frequency_penalty, const std::map<int32_t, float>& logit_bias,
                       uint64_t seed, int logprobs, std::vector<int32_t> banned) {
             SamplerOptions o;
             o.temperature = temperature;
             o.top_k = top_k;
             o.top_p = top_p;
             o.min_p = min_p;
             o.repetition_penalty = repetition_penalty;
             o.presence_penalty = presence_penalty;
             o.frequency_penalty = frequency_penalty;
             o.logit_bias.assign(logit_bias.begin(), logit_bias.end());
             o.seed = seed;
             o.logprobs = logprobs;
             o.banned = std::move(banned);
             return Sampler(std::move(o));
           }),
           py::arg("temperature") = 1.0f, py::arg("top_k") = 0, py::arg("top_p") = 1.0f, py::arg("min_p") = 0.0f,
           py::arg("repetition_penalty") = 1.0f, py::arg("presence_penalty") = 0.0f,
           py::arg("frequency_penalty") = 0.0f, py::arg("logit_bias") = std::map<int32_t, float>(), py::arg("seed") = 0,
           py::arg("logprobs") = -1, py::arg("banned") = std::vector<int32_t>())
      .def("accept", &Sampler::accept, py::arg("tokens"))
      .def("ban", &Sampler::ban, py::arg("tokens"))
      .def_property_readonly("remembers", &Sampler::remembers, "Whether choices depend on the tokens chosen before.")
      .def(
          "sample",
          [](Sampler& sampler, const Array<float>& logits) {
            CHECK(logits.ndim() == 1 && logits.size() > 0, "logits are one row, the array has ", logits.ndim(),
                  " dimensions");
            return sampler.sample(logits.data(), logits.size());
          },
          py::arg("logits"), "The next token for one row of logits.");
}

void bind_engine(py::module_& m) {
  py::class_<Item>(m, "Item").def(
      py::init([](std::vector<int32_t> tokens, int64_t position, std::vector<int32_t> pages, Sampler* sampler,
                  std::optional<bool> prompt) {
        const bool several = tokens.size() > 1;
        return Item{std::move(tokens), position, std::move(pages), sampler, prompt.value_or(several)};
      }),
      py::arg("tokens"), py::arg("position"), py::arg("pages"), py::arg("sampler") = nullptr,
      py::arg("prompt") = std::nullopt, py::keep_alive<1, 5>(), "prompt: None takes several tokens for a prompt.");
  py::class_<Engine>(m, "Model", py::dynamic_attr())
      .def(py::init([](const std::string& path, const std::string& device, int threads, const std::string& mode,
                       int k_bits, int v_bits, int64_t context, int64_t kv_tokens, const std::string& isa) {
             return Engine::open(path, EngineOptions{device, threads, mode, isa, k_bits, v_bits, context,
                                                     kv_tokens ? kv_tokens : context});
           }),
           py::arg("path"), py::arg("device") = "cpu", py::arg("threads") = 0, py::arg("mode") = "a8",
           py::arg("k_bits") = 8, py::arg("v_bits") = 8, py::arg("context") = 4096, py::arg("kv_tokens") = 0,
           py::arg("isa") = "auto", py::call_guard<py::gil_scoped_release>())
      .def("step", &step, py::arg("items"),
           "Runs one step; per item None (no sampler), a Sample, or a sentence saying why this item got no token.")
      .def_property_readonly("overlap_rows", &Engine::overlap_rows,
                             "The most items of a step in halves, by start() and finish(); 0: there are none.")
      .def("start", &start, py::arg("items"),
           "Begins a step of sequences that decode. Items without tokens have those that the step begun before draws.")
      .def("finish", &finish, "Waits for the oldest step that was begun: what step() returns.")
      .def("logits", &logits, py::arg("items"), "float32 [new tokens, vocab] of every new token.")
      .def("nll", &nll, py::arg("items"), "-log p of every token given those before it, per item all but the first.")
      .def("memory", &memory, "Bytes held, by kind.")
      .def_property_readonly("context", [](const Engine& e) { return e.options().context; })
      .def_property_readonly("vocab_size", [](const Engine& e) { return e.config().vocab; })
      .def_property_readonly_static("page_size", [](const py::object&) { return kPageSize; })
      .def("read_bandwidth", &Engine::read_bandwidth, py::arg("megabytes") = 512,
           py::call_guard<py::gil_scoped_release>(), "Bytes a second that the device reads from its memory, measured.")
      .def_property_readonly("pages", &Engine::pages)
      .def_property_readonly("device", [](const Engine& e) { return e.options().device; })
      .def_property_readonly("device_name", &Engine::device_name)
      .def_property_readonly("threads", &Engine::threads)
      .def_property_readonly("isa", &Engine::isa)
      .def_property_readonly("step_rows", &Engine::step_rows)
      .def_property_readonly("decodes_apart", &Engine::decodes_apart)
      .def_property_readonly("mode", [](const Engine& e) { return e.options().mode; })
      .def_property_readonly("weight_bytes", &Engine::weight_bytes);
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
  m.def("cpu_features", &cpu_features, "The processor, its usable cores, and the instruction sets that can run here.");
  m.def("cuda_problem", &cuda_problem, "Why no CUDA card can be used; empty where one can.");
  m.def("cuda_free_memory", &cuda_free_memory, "Bytes that are free on the card.");
  bind_sampler(m);
  bind_engine(m);
  m.def("inspect", &inspect, py::arg("path"),
        "Validates a checkpoint folder: config, linears, files and bits as a dict.");
  m.def("unpack", &unpack_array, py::arg("codes"), py::arg("bits"),
        "uint32 tiles [in/16, out/16, 8*bits] to uint8 codes [out, in]; sizes are the padded ones.");
  m.def("pack", &pack_array, py::arg("codes"), py::arg("bits"), "The inverse of unpack.");
  m.def("dequantize", &dequantize_array, py::arg("codes"), py::arg("scales"), py::arg("levels"), py::arg("bits"),
        "Tiles, float16 scales [groups, out] and int8 levels [2^bits] to float32 weights [out, in].");
}
