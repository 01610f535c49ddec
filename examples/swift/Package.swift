// swift-tools-version: 5.9

import PackageDescription

let package = Package(
    name: "ask-onevision",
    platforms: [.macOS(.v14)],
    targets: [.executableTarget(name: "ask-onevision", path: "Sources")]
)
