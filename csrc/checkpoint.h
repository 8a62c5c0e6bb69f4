// Maps the safetensors files of a folder. What is handed out lies inside its file and has the size that its shape says.
#pragma once
#include <cstddef>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "tensor.h"

namespace halfturn {

const char* name_of(DType type);                            // as in a safetensors header: "F16"
std::string shape_text(const std::vector<int64_t>& shape);  // "[2048, 5632]"

// A whole file, read-only. A file that another process cuts short while it is mapped ends the program (SIGBUS): write
// checkpoints beside their final name and rename them.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;

  const std::byte* data() const { return data_; }
  int64_t size() const { return size_; }
  bool contains(const void* pointer) const;

 private:
  const std::byte* data_ = nullptr;
  int64_t size_ = 0;
};

class Checkpoint {
 public:
  struct Tensor {
    View view;
    std::string file;  // its name within the folder
  };

  // Reads config.json's text and the headers of model.safetensors, or of the shards that model.safetensors.index.json
  // lists. Throws Error for anything that is not as the format says.
  explicit Checkpoint(const std::string& folder);

  const std::string& folder() const { return folder_; }
  const std::string& config_text() const { return config_text_; }
  const std::map<std::string, Tensor, std::less<>>& tensors() const { return tensors_; }
  const Tensor& tensor(const std::string& name) const;
  bool contains(const void* pointer) const;
  const std::map<std::string, int64_t>& files() const { return file_bytes_; }  // name -> bytes of each weight file
  int64_t file_bytes() const;                                                  // of all of them

 private:
  void read_index(const std::string& text);
  void read_shard(const std::string& file);

  std::string folder_, config_text_;
  std::map<std::string, std::string> listed_;  // tensor -> file, where there is an index
  std::vector<MappedFile> mapped_;
  std::map<std::string, int64_t> file_bytes_;
  std::map<std::string, Tensor, std::less<>> tensors_;
};

}  // namespace halfturn
