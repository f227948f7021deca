//! The schemas of the description as clients are generated from them: valid, and of shapes that generators make types of.
//!
//! Invariants: no schema is used for both requests and responses, so that members may be `null` in the one and required in the other;
//! no member has a `default`, which generators take for "always there".

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

/// Puts all schemas in order.
pub fn normalize_schemas(api: &mut Value) {
    binary(api);
    plain_text(api);
    make_run_vm(api);
    let (asked, answered) = (reachable(api, "requestBody"), reachable(api, "responses"));
    for name in asked.intersection(&answered) {
        if is_object(&api["components"]["schemas"][name]) {
            split_off(api, name, &asked);
        }
    }
    let asked = reachable(api, "requestBody");
    let Some(schemas) = api["components"]["schemas"].as_object_mut() else { return };
    for (name, schema) in schemas.iter_mut() {
        let is_asked = asked.contains(name);
        let required = words(&schema["required"]);
        let members = schema.get_mut("properties").and_then(Value::as_object_mut);
        for (member, kind) in members.into_iter().flatten() {
            without_default(kind, is_asked);
            if is_asked && !required.contains(member) {
                nullable(kind);
            }
        }
    }
}

fn words(list: &Value) -> BTreeSet<String> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn is_object(schema: &Value) -> bool {
    schema["properties"].is_object()
}

/// Bytes are a string of the format `binary`, not a list of numbers.
fn binary(api: &mut Value) {
    each(api, &mut |object| {
        for kind in ["application/octet-stream", "application/x-tar"] {
            if let Some(content) = object.get_mut(kind).filter(|content| content.is_object()) {
                content["schema"] = json!({ "type": "string", "format": "binary" });
            }
        }
    });
}

/// Links of the program's own documentation have no meaning here.
fn plain_text(api: &mut Value) {
    each(api, &mut |object| {
        if let Some(Value::String(text)) = object.get_mut("description") {
            *text = text.replace("[`", "`").replace("`]", "`").replace("crate::nido::Nido::", "");
        }
    });
}

/// The VM of a run is one that is spawned, but for its name, which is made up.
fn make_run_vm(api: &mut Value) {
    let schemas = &mut api["components"]["schemas"];
    let mut vm = schemas["SpawnRequest"].clone();
    let mut required = words(&vm["required"]);
    required.remove("name");
    vm["required"] = json!(required);
    if required.is_empty()
        && let Some(vm) = vm.as_object_mut()
    {
        vm.remove("required");
    }
    vm["description"] = json!("The VM of a run. Every field has a default; nido generates a name if none is given.");
    schemas["RunVm"] = vm;
    let (from, to) = ("#/components/schemas/SpawnRequest", "#/components/schemas/RunVm");
    lead_to(&mut schemas["RunRequest"], from, to);
}

/// The schemas that these parts of operations lead to.
fn reachable(api: &Value, part: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let items = api["paths"].as_object().into_iter().flat_map(Map::values).filter_map(Value::as_object);
    let mut open: Vec<&Value> = items.flat_map(Map::values).map(|operation| &operation[part]).collect();
    while let Some(value) = open.pop() {
        match value {
            Value::Object(object) => {
                let name = object.get("$ref").and_then(Value::as_str);
                if let Some(name) = name.and_then(|name| name.strip_prefix("#/components/schemas/"))
                    && found.insert(name.to_owned())
                {
                    open.push(&api["components"]["schemas"][name]);
                }
                open.extend(object.values());
            }
            Value::Array(items) => open.extend(items),
            _ => {}
        }
    }
    found
}

/// Gives requests a schema of their own; that of responses has all of its members.
fn split_off(api: &mut Value, name: &str, asked: &BTreeSet<String>) {
    let theirs = name.strip_suffix("Spec").unwrap_or(name).to_owned() + "Request";
    let schemas = &mut api["components"]["schemas"];
    let copy = schemas[name].clone();
    let members: Vec<_> = schemas[name]["properties"].as_object().into_iter().flat_map(Map::keys).cloned().collect();
    schemas[name]["required"] = json!(members);
    schemas[&theirs] = copy;
    let (from, to) = (format!("#/components/schemas/{name}"), format!("#/components/schemas/{theirs}"));
    for one in asked.iter().filter(|one| *one != name) {
        lead_to(&mut schemas[one], &from, &to);
    }
    for item in api["paths"].as_object_mut().into_iter().flat_map(|paths| paths.values_mut()) {
        for operation in item.as_object_mut().into_iter().flat_map(|item| item.values_mut()) {
            if let Some(body) = operation.get_mut("requestBody") {
                lead_to(body, &from, &to);
            }
        }
    }
}

fn lead_to(value: &mut Value, from: &str, to: &str) {
    each(value, &mut |object| {
        if let Some(Value::String(place)) = object.get_mut("$ref")
            && place == from
        {
            to.clone_into(place);
        }
    });
}

/// A default as words.
fn without_default(kind: &mut Value, told: bool) {
    let Some(object) = kind.as_object_mut() else { return };
    let Some(default) = object.remove("default") else { return };
    let says_nothing = default.is_null() || default == json!([]) || default == json!({}) || default == json!(false);
    if told && !says_nothing {
        let about = object.get("description").and_then(Value::as_str).unwrap_or_default().trim();
        let shown = default.as_str().map_or_else(|| default.to_string(), str::to_owned);
        object.insert("description".into(), json!(format!("{about} Default: `{shown}`.").trim()));
    }
}

/// `null` is absent.
fn nullable(kind: &mut Value) {
    let Some(object) = kind.as_object_mut() else { return };
    if let Some(kinds) = object.get_mut("type") {
        match kinds {
            Value::String(one) => *kinds = json!([one, "null"]),
            Value::Array(many) if !many.contains(&json!("null")) => many.push(json!("null")),
            _ => {}
        }
        return;
    }
    let of_list = |list: Option<Value>| list.and_then(|list| list.as_array().and_then(|list| list.first().cloned()));
    let target = match object.remove("$ref") {
        Some(place) => Some(json!({ "$ref": place })),
        None => of_list(object.remove("allOf")),
    };
    if let Some(target) = target {
        object.insert("oneOf".into(), json!([target, { "type": "null" }]));
    }
}

/// Every object of a tree.
fn each(value: &mut Value, change: &mut impl FnMut(&mut Map<String, Value>)) {
    match value {
        Value::Object(object) => {
            change(object);
            object.values_mut().for_each(|value| each(value, change));
        }
        Value::Array(items) => items.iter_mut().for_each(|value| each(value, change)),
        _ => {}
    }
}
