#include "checkpoint.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>
#include <set>
#include <utility>

#include "check.h"
#include "json.h"

namespace halfturn {

const char* name_of(DType type) {
  switch (type) {
    case DType::kF16: return "F16";
    case DType::kF32: return "F32";
    case DType::kI8: return "I8";
    case DType::kU32: return "U32";
  }
  return "?";
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

MappedFile::MappedFile(const std::string& path) {
  // O_NONBLOCK: opening a pipe must not wait for somebody to write into it.
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  CHECK(file >= 0, path, " can't be opened: ", std::strerror(errno));
  struct stat status{};
  const bool known = ::fstat(file, &status) == 0;
  void* data = nullptr;
  if (known && S_ISREG(status.st_mode) && status.st_size > 0)
    data = ::mmap(nullptr, size_t(status.st_size), PROT_READ, MAP_PRIVATE, file, 0);
  const int reason = errno;
  ::close(file);
  CHECK(known && S_ISREG(status.st_mode), path, " is not a file: give the folder of a Halfturn checkpoint");
  CHECK(status.st_size > 0, path, " is empty: get the file again");
  CHECK(data != MAP_FAILED, path, " (", status.st_size, " bytes) can't be mapped: ", std::strerror(reason));
  data_ = static_cast<const std::byte*>(data);
  size_ = status.st_size;
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<std::byte*>(data_), size_t(size_));
}

bool MappedFile::contains(const void* pointer) const {
  return std::less_equal<>()(static_cast<const void*>(data_), pointer) &&
         std::less<>()(pointer, static_cast<const void*>(data_ + size_));
}

namespace {

constexpr char kSingle[] = "model.safetensors";
constexpr char kIndex[] = "model.safetensors.index.json";

bool exists(const std::string& path) {
  struct stat status{};
  return ::stat(path.c_str(), &status) == 0;
}

std::string read_text(const std::string& path) {
  MappedFile file(path);
  CHECK(file.size() <= kJsonBytes, path, " has ", file.size(), " bytes, at most ", kJsonBytes,
        " are read: it is damaged or not a checkpoint's");
  return {reinterpret_cast<const char*>(file.data()), size_t(file.size())};
}

// One entry of a safetensors header, as far as it can be judged alone.
struct Entry {
  std::string name;
  DType type = DType::kU32;
  std::vector<int64_t> shape;
  int64_t begin = 0, end = 0;
};

Entry read_entry(const JsonMember& member, const std::string& file) {
  Entry entry;
  entry.name = member.key;
  const std::string tensor = shown(member.key) + " in " + file;
  const Json& fields = member.value;
  const Json *type = fields.find("dtype"), *shape = fields.find("shape"), *offsets = fields.find("data_offsets");
  CHECK(type && type->is(Json::Type::kString) && shape && shape->is(Json::Type::kArray) && offsets &&
            offsets->is(Json::Type::kArray) && offsets->array.size() == 2 && fields.object.size() == 3,
        tensor, " is not described by dtype, shape and two data_offsets: the header is damaged, get the file again");

  bool known = false;
  for (DType candidate : {DType::kF16, DType::kF32, DType::kI8, DType::kU32})
    if (type->string == name_of(candidate)) entry.type = candidate, known = true;
  CHECK(known, tensor, " has dtype ", shown(type->string),
        ", a Halfturn checkpoint holds U32, F16, I8 and F32 only: convert the model with `halfturn convert`");

  CHECK(!shape->array.empty() && shape->array.size() <= 8, tensor, " has ", shape->array.size(),
        " dimensions, expected 1 to 8: the header is damaged");
  int64_t bytes = size_of(entry.type);
  for (const Json& size : shape->array) {
    CHECK(size.is(Json::Type::kInteger) && size.integer > 0 && !__builtin_mul_overflow(bytes, size.integer, &bytes),
          tensor, " has the dimension ", shown(size), ", expected a positive size that fits in 64 bits");
    entry.shape.push_back(size.integer);
  }
  const Json &begin = offsets->array[0], &end = offsets->array[1];
  CHECK(begin.is(Json::Type::kInteger) && end.is(Json::Type::kInteger) && begin.integer >= 0 &&
            end.integer >= begin.integer,
        tensor, " has the data_offsets ", shown(begin), " and ", shown(end), ": the header is damaged");
  entry.begin = begin.integer;
  entry.end = end.integer;
  CHECK(entry.end - entry.begin == bytes, tensor, " is ", name_of(entry.type), " ", shape_text(entry.shape), " = ",
        bytes, " bytes, its data_offsets span ", entry.end - entry.begin, ": the header is damaged");
  return entry;
}

// The tensors must fill the space behind the header without overlap or hole, as safetensors demands.
void check_layout(std::vector<Entry>& entries, const std::string& file, int64_t space) {
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.begin < b.begin; });
  for (const Entry& entry : entries)
    CHECK(entry.end <= space, shown(entry.name), " in ", file, " ends at byte ", entry.end, ", the file holds ", space,
          " bytes of tensors: it was cut short, get the file again");
  int64_t position = 0;
  for (const Entry& entry : entries) {
    CHECK(entry.begin == position, shown(entry.name), " in ", file, " begins at byte ", entry.begin,
          ", the tensor before it ends at ", position, ": tensors overlap or leave a hole, the header is damaged");
    position = entry.end;
  }
  CHECK(position == space, file, " holds ", space, " bytes of tensors, its header describes ", position,
        ": it is damaged, get the file again");
}

}  // namespace

Checkpoint::Checkpoint(const std::string& folder) : folder_(folder) {
  CHECK(folder.find('\0') == std::string::npos, "a folder's name can't hold a zero byte");
  struct stat status{};
  CHECK(::stat(folder.c_str(), &status) == 0, folder, " can't be opened: ", std::strerror(errno));
  CHECK(S_ISDIR(status.st_mode), folder, " is not a folder: give the folder that `halfturn convert` made");
  const std::string config = folder + "/config.json";
  CHECK(exists(config), folder, " has no config.json: give the folder that `halfturn convert` made");
  config_text_ = read_text(config);

  const bool single = exists(folder + "/" + kSingle), index = exists(folder + "/" + kIndex);
  CHECK(single || index, folder, " has neither ", kSingle, " nor ", kIndex, ": the weights are missing");
  CHECK(!single || !index, folder, " has both ", kSingle, " and ", kIndex, ": it mixes two models, remove one");
  if (single) {
    read_shard(kSingle);
    return;
  }
  read_index(read_text(folder + "/" + kIndex));
  std::set<std::string> shards;
  for (const auto& [name, file] : listed_) shards.insert(file);
  for (const auto& file : shards) read_shard(file);
  for (const auto& [name, file] : listed_)
    CHECK(tensors_.count(name), shown(name), " is not in ", file, ", where ", kIndex,
          " lists it: the shard belongs to another model");
}

void Checkpoint::read_index(const std::string& text) {
  const Json index = parse_json(text, kIndex);
  const Json* map = index.find("weight_map");
  CHECK(map && map->is(Json::Type::kObject) && !map->object.empty(), kIndex, " has no weight_map: it is damaged");
  for (const JsonMember& member : map->object) {
    CHECK(member.value.is(Json::Type::kString), kIndex, " lists ", shown(member.key), " in ", shown(member.value),
          ", expected the name of a file");
    const std::string& file = member.value.string;
    // A name, never a path: nothing outside the folder is opened on the word of a file inside it. (The file itself may
    // be a symbolic link: the hub's cache is made of them.)
    const bool plain = !file.empty() && file.size() <= 255 && file[0] != '.' &&
                       file.find_first_of(std::string_view("/\\:\0", 4)) == std::string::npos &&
                       file.ends_with(".safetensors");
    CHECK(plain, kIndex, " lists ", shown(member.key), " in ", shown(file),
          ", expected the plain name of a .safetensors file in the same folder");
    listed_[member.key] = file;
  }
}

void Checkpoint::read_shard(const std::string& file) {
  const std::string path = folder_ + "/" + file;
  CHECK(exists(path), folder_, " has no ", shown(file), ", which ", kIndex, " lists: the download is incomplete");
  mapped_.emplace_back(path);
  const MappedFile& mapped = mapped_.back();
  file_bytes_[file] = mapped.size();
  CHECK(mapped.size() >= 8, file, " has ", mapped.size(), " bytes, a header alone has more: get the file again");
  uint64_t length = 0;
  for (int i = 0; i < 8; ++i) length |= uint64_t(mapped.data()[i]) << (8 * i);
  CHECK(length <= uint64_t(mapped.size() - 8), file, " has ", mapped.size(), " bytes, its header says that it has ",
        length, " itself: the file was cut short or is no safetensors file");
  CHECK(length <= uint64_t(kJsonBytes), "the header of ", file, " has ", length, " bytes, at most ", kJsonBytes,
        " are read: it is damaged");
  const std::string_view text(reinterpret_cast<const char*>(mapped.data()) + 8, size_t(length));
  const Json header = parse_json(text, "the header of " + file);
  CHECK(header.is(Json::Type::kObject), "the header of ", file, " is no JSON object: it is no safetensors file");

  std::vector<Entry> entries;
  for (const JsonMember& member : header.object)
    if (member.key != "__metadata__") entries.push_back(read_entry(member, file));
  check_layout(entries, file, mapped.size() - 8 - int64_t(length));

  for (Entry& entry : entries) {
    if (!listed_.empty()) {
      auto at = listed_.find(entry.name);
      CHECK(at != listed_.end(), shown(entry.name), " is in ", file, " but not in ", kIndex,
            ": the shard belongs to another model");
      CHECK(at->second == file, shown(entry.name), " is in ", file, ", ", kIndex, " lists it in ", at->second,
            ": the shards belong to different models");
    }
    const int64_t place = 8 + int64_t(length) + entry.begin;
    CHECK(place % size_of(entry.type) == 0, shown(entry.name), " in ", file, " begins at byte ", place,
          " of the file, ", name_of(entry.type), " needs a multiple of ", size_of(entry.type),
          ": write the file with the library safetensors");
    Tensor tensor{{entry.type, std::move(entry.shape), mapped.data() + place}, file};
    tensors_.emplace(entry.name, std::move(tensor));
  }
}

const Checkpoint::Tensor& Checkpoint::tensor(const std::string& name) const {
  auto at = tensors_.find(name);
  CHECK(at != tensors_.end(), shown(name), " is missing in ", folder_,
        ": config.json describes another model, or the download is incomplete");
  return at->second;
}

bool Checkpoint::contains(const void* pointer) const {
  return std::any_of(mapped_.begin(), mapped_.end(), [&](const MappedFile& file) { return file.contains(pointer); });
}

int64_t Checkpoint::file_bytes() const {
  int64_t bytes = 0;
  for (const auto& [name, size] : file_bytes_) bytes += size;
  return bytes;
}

}  // namespace halfturn
