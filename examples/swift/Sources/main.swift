// Asks a server of mlx-onevision about images and videos, and prints the answer as it comes.
//
//     mlx-onevision serve
//     swift run ask-onevision "What is in the image?" ../shapes.png
//
// ONEVISION_URL names another server than http://127.0.0.1:8000/v1, and ONEVISION_TOKEN holds the
// token of one that wants one. What is in this file works in an application, too; one in the sandbox
// needs com.apple.security.network.client.

import Foundation
import UniformTypeIdentifiers

/// The body of POST /v1/chat/completions.
struct ChatRequest: Encodable {
    struct Message: Encodable {
        let role: String
        let content: [Part]
    }

    /// A text, a picture or a video; what is nil is left out.
    struct Part: Encodable {
        let type: String
        var text: String?
        var imageURL: Place?
        var videoURL: Place?

        enum CodingKeys: String, CodingKey {
            case type
            case text
            case imageURL = "image_url"
            case videoURL = "video_url"
        }
    }

    struct Place: Encodable {
        let url: String
    }

    struct StreamOptions: Encodable {
        let includeUsage: Bool

        enum CodingKeys: String, CodingKey {
            case includeUsage = "include_usage"
        }
    }

    let messages: [Message]
    let maxTokens: Int
    let stream: Bool
    let streamOptions: StreamOptions

    enum CodingKeys: String, CodingKey {
        case messages
        case maxTokens = "max_tokens"
        case stream
        case streamOptions = "stream_options"
    }
}

/// One of the server-sent events of the answer.
struct Chunk: Decodable {
    struct Choice: Decodable {
        let delta: Delta
        let finishReason: String?

        enum CodingKeys: String, CodingKey {
            case delta
            case finishReason = "finish_reason"
        }
    }

    struct Delta: Decodable {
        let content: String?
    }

    struct Usage: Decodable {
        let promptTokens: Int
        let completionTokens: Int

        enum CodingKeys: String, CodingKey {
            case promptTokens = "prompt_tokens"
            case completionTokens = "completion_tokens"
        }
    }

    let choices: [Choice]
    let usage: Usage?
}

/// What comes instead of an answer: as the body, or, once an answer has begun, as its last event.
struct Refusal: Decodable {
    struct Reason: Decodable {
        let message: String
    }

    let error: Reason
}

struct Failure: LocalizedError {
    let errorDescription: String?

    init(_ said: String) {
        errorDescription = said
    }
}

struct Client {
    let server: URL
    let token: String?

    /// Calls `show` with the chunks of an answer as they come. When its task is cancelled, the
    /// connection closes, and the server ends the answer.
    func ask(_ question: ChatRequest, show: (Chunk) -> Void) async throws {
        var request = URLRequest(url: server.appendingPathComponent("chat/completions"))
        request.httpMethod = "POST"
        request.setValue("application/json", forHTTPHeaderField: "Content-Type")
        if let token {
            request.setValue("Bearer \(token)", forHTTPHeaderField: "Authorization")
        }
        request.httpBody = try JSONEncoder().encode(question)

        let (bytes, response) = try await URLSession.shared.bytes(for: request)
        let status = (response as? HTTPURLResponse)?.statusCode ?? 0
        if status != 200 {
            var body = Data()
            for try await byte in bytes {
                body.append(byte)
            }
            let refusal = try? JSONDecoder().decode(Refusal.self, from: body)
            throw Failure(refusal?.error.message ?? "the server answered \(status)")
        }
        for try await line in bytes.lines {
            // Lines that begin with a colon are comments, which keep the connection open.
            guard line.hasPrefix("data: ") else { continue }
            let event = String(line.dropFirst("data: ".count))
            if event == "[DONE]" { return }
            let data = Data(event.utf8)
            if let refusal = try? JSONDecoder().decode(Refusal.self, from: data) {
                throw Failure(refusal.error.message)
            }
            let chunk = try JSONDecoder().decode(Chunk.self, from: data)
            show(chunk)
        }
        throw Failure("the answer broke off")
    }
}

/// A file as a part of a message. Its bytes travel with the request; the server looks at them, and
/// not at the type.
func part(ofFile path: String) throws -> ChatRequest.Part {
    let file = URL(fileURLWithPath: path)
    let type = UTType(filenameExtension: file.pathExtension)
    let mime = type?.preferredMIMEType ?? "application/octet-stream"
    let data = try Data(contentsOf: file).base64EncodedString()
    let place = ChatRequest.Place(url: "data:\(mime);base64,\(data)")
    if let type, type.conforms(to: .movie) {
        return ChatRequest.Part(type: "video_url", videoURL: place)
    }
    return ChatRequest.Part(type: "image_url", imageURL: place)
}

func say(_ text: String, to file: FileHandle) {
    file.write(Data(text.utf8))
}

func run() async throws {
    let arguments = CommandLine.arguments.dropFirst()
    guard let question = arguments.first else {
        throw Failure("usage: ask-onevision QUESTION [FILE...]")
    }
    let environment = ProcessInfo.processInfo.environment
    let address = environment["ONEVISION_URL"] ?? "http://127.0.0.1:8000/v1"
    guard let server = URL(string: address) else {
        throw Failure("\(address) is not an address")
    }
    var parts = try arguments.dropFirst().map { try part(ofFile: $0) }
    parts.append(ChatRequest.Part(type: "text", text: question))
    let request = ChatRequest(
        messages: [ChatRequest.Message(role: "user", content: parts)],
        maxTokens: 256,
        stream: true,
        streamOptions: ChatRequest.StreamOptions(includeUsage: true)
    )
    let client = Client(server: server, token: environment["ONEVISION_TOKEN"])
    try await client.ask(request) { chunk in
        for choice in chunk.choices {
            say(choice.delta.content ?? "", to: .standardOutput)
            if choice.finishReason == "length" {
                say("\n(cut off)", to: .standardError)
            }
        }
        if let usage = chunk.usage {
            say("\n", to: .standardOutput)
            let counts = "\(usage.promptTokens) + \(usage.completionTokens) tokens\n"
            say(counts, to: .standardError)
        }
    }
}

do {
    try await run()
} catch {
    say("\(error.localizedDescription)\n", to: .standardError)
    exit(1)
}
