// SPDX-License-Identifier: Apache-2.0
//
// What the programs of this folder share: a picture from a PGM or PPM file, what an exported network's notes say (JSON,
// under "nearsight"; docs/howto/deploy.md), and the answer. A program of yours may have libraries for all three.

#ifndef NEARSIGHT_EXAMPLES_PICTURE_H
#define NEARSIGHT_EXAMPLES_PICTURE_H

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>

struct Picture {
    int64_t channels = 0, height = 0, width = 0;
    std::vector<float> values;  // (channels, height, width), 0 to 1
};

inline Picture read_picture(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string kind;
    int most = 0;
    Picture picture;
    file >> kind >> picture.width >> picture.height >> most;
    if (!file || (kind != "P5" && kind != "P6") || most != 255 || file.get() != '\n')
        throw std::runtime_error(path + " is no PGM or PPM file of 8 bits without comments");
    picture.channels = kind == "P6" ? 3 : 1;
    const int64_t cells = picture.height * picture.width;
    std::vector<unsigned char> bytes((size_t)(picture.channels * cells));
    if (!file.read((char*)bytes.data(), (std::streamsize)bytes.size()))
        throw std::runtime_error(path + " ends too soon");
    picture.values.resize(bytes.size());
    for (int64_t c = 0; c < picture.channels; ++c)
        for (int64_t i = 0; i < cells; ++i)
            picture.values[(size_t)(c * cells + i)] = bytes[(size_t)(i * picture.channels + c)] / 255.0f;
    return picture;
}

// The list that follows a name: `"mean": [0.5, 0.5]`.
inline std::string list_in(const std::string& notes, const std::string& name) {
    std::smatch found;
    if (!std::regex_search(notes, found, std::regex('"' + name + "\": \\[([^\\]]*)\\]")))
        throw std::runtime_error("the notes have no list " + name);
    return found[1];
}

inline std::vector<std::string> matches(const std::string& text, const char* pattern, int group) {
    const std::regex one(pattern);
    std::vector<std::string> found;
    for (std::sregex_iterator i(text.begin(), text.end(), one), end; i != end; ++i) found.push_back((*i)[group]);
    return found;
}

inline std::vector<float> numbers(const std::string& notes, const std::string& name) {
    std::vector<float> found;
    for (const std::string& text : matches(list_in(notes, name), "[^, ]+", 0)) found.push_back(std::stof(text));
    return found;
}

// As the network was shown pictures when it was trained.
inline void normalize(Picture& picture, const std::string& notes) {
    const std::vector<float> mean = numbers(notes, "mean"), std = numbers(notes, "std");
    if ((int64_t)mean.size() != picture.channels || mean.size() != std.size())
        throw std::runtime_error("the network takes pictures of " + std::to_string(mean.size()) + " channels");
    const size_t cells = (size_t)(picture.height * picture.width);
    for (size_t i = 0; i < picture.values.size(); ++i)
        picture.values[i] = (picture.values[i] - mean[i / cells]) / std[i / cells];
}

inline void print_answer(const float* logits, const std::string& notes) {
    const std::vector<std::string> classes = matches(list_in(notes, "classes"), "\"([^\"]*)\"", 1);
    for (size_t i = 0; i < classes.size(); ++i) std::printf("%s %.6f\n", classes[i].c_str(), logits[i]);
}

#endif
