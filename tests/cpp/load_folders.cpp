// Loads and uses every folder named on the command line; writes "loaded" or "refused: REASON" for each, one a line.
// Ends with 0 unless something is wrong with the program itself (the sanitizers end it otherwise).
#include <cstdio>

#include "use_model.h"

int main(int count, char** folders) {
  for (int i = 1; i < count; ++i) {
    std::string outcome = "loaded";
    bool usable = false;
    try {
      const halfturn::Model model = halfturn::load_model(folders[i]);
      usable = true;
      halfturn::use_model(model);
    } catch (const halfturn::Error& error) {
      if (usable) {
        std::fprintf(stderr, "%s was loaded, but: %s\n", folders[i], error.what());
        return 1;
      }
      outcome = std::string("refused: ") + error.what();
    }
    std::puts(outcome.c_str());
  }
}
