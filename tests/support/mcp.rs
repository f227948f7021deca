//! A client for MCP over standard input and output: raw messages, in both eras of the protocol.
//!
//! Invariant: whatever a tool answers is held against the schema that the tool was listed with.

use std::collections::HashMap;
use std::io::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use super::{Home, RunningNido};

/// The two ways in which the protocol begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Era {
    /// `initialize`, then a session.
    Legacy,
    /// Every request is complete.
    Modern,
}

impl Era {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Legacy, Self::Modern];

    /// The revision.
    pub fn version(self) -> &'static str {
        match self {
            Self::Legacy => "2025-11-25",
            Self::Modern => "2026-07-28",
        }
    }
}

/// A server that runs, and the messages sent to it.
pub struct Client {
    live: Option<RunningNido>,
    era: Era,
    capabilities: Value,
    next: u64,
    /// Answers that came before they were waited for.
    answers: HashMap<u64, Value>,
    /// What the server sent by itself: notifications and requests, in their order.
    pub heard: Vec<Value>,
    schemas: HashMap<String, Value>,
}

impl Client {
    /// Starts a server, and sends the initial messages.
    pub fn start(home: &Home, era: Era) -> Self {
        Self::with(home, era, &[], json!({}))
    }

    /// The same with more flags, for a client that can more.
    pub fn with(home: &Home, era: Era, flags: &[&str], capabilities: Value) -> Self {
        Self::started(home, era, flags, capabilities, None)
    }

    /// The same, started in a directory.
    pub fn started(home: &Home, era: Era, flags: &[&str], capabilities: Value, directory: Option<&Path>) -> Self {
        let start = home.nido(["mcp-server", "start"]);
        let start = match directory {
            Some(directory) => start.in_directory(directory),
            None => start,
        };
        let live = flags.iter().fold(start, |nido, flag| nido.arg(*flag)).start();
        let (answers, heard, schemas) = Default::default();
        let mut client = Self { live: Some(live), era, capabilities, next: 1, answers, heard, schemas };
        if era == Era::Legacy {
            let hello = json!({
                "protocolVersion": era.version(), "capabilities": client.capabilities,
                "clientInfo": { "name": "tests", "version": "1" },
            });
            let told = client.response_to("initialize", hello);
            assert_eq!(told["result"]["protocolVersion"], era.version(), "{told}");
            client.send_json(&json!({ "jsonrpc": "2.0", "method": "notifications/initialized" }));
        }
        client
    }

    /// Its process.
    pub fn live(&mut self) -> &mut RunningNido {
        self.live.as_mut().unwrap()
    }

    /// Sends a message as it is.
    pub fn send_json(&mut self, message: &Value) {
        writeln!(self.live().stdin.as_mut().unwrap(), "{message}").unwrap();
    }

    /// Sends a line, whatever it is.
    pub fn raw(&mut self, line: &str) {
        writeln!(self.live().stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Waits for an error that answers nothing.
    pub fn next_error(&mut self) -> Value {
        loop {
            let message = self.next();
            if message.get("error").is_some() && message.get("id").is_none_or(Value::is_null) {
                return message;
            }
            match message["id"].as_u64() {
                Some(id) if message.get("method").is_none() => drop(self.answers.insert(id, message)),
                _ => self.heard.push(message),
            }
        }
    }

    /// Sends a request, and returns its id.
    pub fn request(&mut self, method: &str, mut params: Value) -> u64 {
        let id = self.next;
        self.next += 1;
        if self.era == Era::Modern {
            let mut meta = json!({
                "io.modelcontextprotocol/protocolVersion": self.era.version(),
                "io.modelcontextprotocol/clientInfo": { "name": "tests", "version": "1" },
                "io.modelcontextprotocol/clientCapabilities": self.capabilities,
            });
            if let Some(more) = params["_meta"].as_object() {
                meta.as_object_mut().unwrap().extend(more.clone());
            }
            params["_meta"] = meta;
        }
        self.send_json(&json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params }));
        id
    }

    /// The next message, whatever it is. Every line has to be one.
    fn next(&mut self) -> Value {
        let line = self.live().line();
        let message: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert_eq!(message["jsonrpc"], "2.0", "{message}");
        message
    }

    /// Waits for the answer to a request.
    pub fn answer(&mut self, id: u64) -> Value {
        loop {
            if let Some(answer) = self.answers.remove(&id) {
                return answer;
            }
            let message = self.next();
            match message["id"].as_u64() {
                Some(id) if message.get("method").is_none() => drop(self.answers.insert(id, message)),
                _ => self.heard.push(message),
            }
        }
    }

    /// Waits for a message that the server sends by itself.
    pub fn hear(&mut self, method: &str) -> Value {
        loop {
            if let Some(at) = self.heard.iter().position(|message| message["method"] == method) {
                return self.heard.remove(at);
            }
            let message = self.next();
            match message["id"].as_u64() {
                Some(id) if message.get("method").is_none() => drop(self.answers.insert(id, message)),
                _ => self.heard.push(message),
            }
        }
    }

    /// Asks and waits for the answer.
    pub fn response_to(&mut self, method: &str, params: Value) -> Value {
        let id = self.request(method, params);
        self.answer(id)
    }

    /// Asks, and expects a result.
    #[track_caller]
    pub fn result(&mut self, method: &str, params: Value) -> Value {
        let answer = self.response_to(method, params);
        assert!(answer.get("error").is_none(), "{answer}");
        answer["result"].clone()
    }

    /// The tools, by name.
    pub fn tools(&mut self) -> HashMap<String, Value> {
        let list = self.result("tools/list", json!({}));
        let tools = list["tools"].as_array().unwrap().iter();
        tools.map(|tool| (tool["name"].as_str().unwrap().to_owned(), tool.clone())).collect()
    }

    /// Calls a tool.
    #[track_caller]
    pub fn call(&mut self, tool: &str, arguments: Value) -> Value {
        let id = self.begin(tool, arguments, json!({}));
        self.done(tool, id)
    }

    /// Begins to call a tool.
    pub fn begin(&mut self, tool: &str, arguments: Value, meta: Value) -> u64 {
        let mut params = json!({ "name": tool });
        params["arguments"] = arguments;
        params["_meta"] = meta;
        self.request("tools/call", params)
    }

    /// Waits for the result of a call, and holds it against the tool's schema.
    #[track_caller]
    pub fn done(&mut self, tool: &str, id: u64) -> Value {
        let answer = self.answer(id);
        assert!(answer.get("error").is_none(), "{answer}");
        let result = answer["result"].clone();
        if result["resultType"] == "input_required" {
            return result;
        }
        if !self.schemas.contains_key(tool) {
            self.schemas = self.tools().into_iter().map(|(name, tool)| (name, tool["outputSchema"].clone())).collect();
        }
        let structured = &result["structuredContent"];
        assert!(structured.is_object(), "{result}");
        if let Some(schema) = self.schemas.get(tool)
            && let Err(error) = jsonschema::validate(schema, structured)
        {
            panic!("{tool} answers what its schema does not know: {error}\n{structured}");
        }
        result
    }

    /// Calls a tool that has to succeed; what it answers as data.
    #[track_caller]
    pub fn good(&mut self, tool: &str, arguments: Value) -> Value {
        let result = self.call(tool, arguments);
        assert_eq!(result["isError"], false, "{result}");
        result["structuredContent"].clone()
    }

    /// Calls a tool that has to fail with this code; returns the error.
    #[track_caller]
    pub fn bad(&mut self, tool: &str, arguments: Value, code: &str) -> Value {
        let result = self.call(tool, arguments);
        assert_eq!(result["isError"], true, "{result}");
        let error = result["structuredContent"]["error"].clone();
        assert_eq!(error["code"], code, "{error}");
        let text = result["content"][0]["text"].as_str().unwrap();
        assert!(text.contains(code) && text.starts_with(error["message"].as_str().unwrap()), "{text}");
        error
    }

    /// Kills the server, whatever it is doing.
    pub fn killed(mut self) {
        let live = self.live.take().unwrap();
        live.kill();
        assert!(live.end(), "it has ended by itself");
    }

    /// Ends the server with a signal, and waits for its end.
    pub fn told_to_end(mut self) -> super::run::FinishedRun {
        let live = self.live.take().unwrap();
        live.signal(rustix::process::Signal::TERM);
        live.wait()
    }

    /// Ends standard input and waits for the server's end.
    pub fn ended(mut self) -> super::run::FinishedRun {
        let mut live = self.live.take().unwrap();
        drop(live.stdin.take());
        live.wait()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(mut live) = self.live.take() {
            drop(live.stdin.take());
            if !std::thread::panicking() {
                live.wait().ok();
            }
        }
    }
}
